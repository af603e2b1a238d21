"""What every report for people is made of: module paths told together, sizes and times with their units."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from rich.console import Console

console = Console(highlight=False)


def together(wheres: Iterable[str]) -> list[str]:
    """Module paths, those that differ in one number only as one: `layers.{0..5}.norm`, or `norm (12 calls)`."""
    wheres = list(wheres)
    called_often = {where.split("#")[0] for where in wheres if "#" in where}
    rows = []
    for where in wheres:
        parts = re.split(r"(\d+)", where if "#" in where or where not in called_often else f"{where}#1")
        rows.append(tuple((int(part),) if i % 2 else part for i, part in enumerate(parts)))
    for place in reversed(range(1, max(map(len, rows), default=0), 2)):
        rows = _merged(rows, place)
    return ["".join(part if isinstance(part, str) else _numbers(part) for part in row) for row in map(_calls, rows)]


def _merged(rows: list[tuple], place: int) -> list[tuple]:
    """Rows that differ in one place only become one row with all their numbers in that place."""
    merged: dict[tuple, list[int]] = {}
    for row in rows:
        if place < len(row):
            merged.setdefault((*row[:place], None, *row[place + 1 :]), []).extend(row[place])
        else:
            merged[row] = []
    return [tuple(tuple(numbers) if part is None else part for part in row) for row, numbers in merged.items()]


def _calls(row: tuple) -> tuple:
    """`norm#{1..12}` is one module called twelve times."""
    if len(row) < 3 or not str(row[-3]).endswith("#"):
        return row
    numbers = row[-2]
    all_calls = numbers == tuple(range(1, len(numbers) + 1))
    said = f"{len(numbers)} calls" if all_calls else f"call {_numbers(numbers)}"
    return (*row[:-3], f"{str(row[-3]).removesuffix('#')} ({said})")


def _numbers(numbers: Sequence[int]) -> str:
    if len(numbers) == 1:
        return str(numbers[0])
    low, high = min(numbers), max(numbers)
    if high - low + 1 == len(numbers):
        return f"{{{low}..{high}}}"
    return "{" + ",".join(map(str, sorted(numbers))) + "}"


def size(count: float, unit: str = "B") -> str:
    for prefix in ("", "k", "M", "G", "T"):
        if count < 999.5:
            return f"{count:.3g} {prefix}{unit}".strip()
        count /= 1000
    return f"{count:.3g} P{unit}"


def duration(seconds: float) -> str:
    """A time with three digits, in the unit that suits it."""
    for factor, unit in ((1, "s"), (1e3, "ms"), (1e6, "us")):
        if seconds * factor >= 0.9995:
            return f"{seconds * factor:.3g} {unit}"
    return f"{seconds * 1e9:.3g} ns"


def general(reason: str | None) -> str:
    """A reason without its numbers: what reasons that are alike have in common."""
    return re.sub(r"\d+", "N", reason or "")
