"""Tables for people: what the verbs found, did and proved."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from taut.api import Applied, Inspection
    from taut.demonstrate import Demonstration
    from taut.plans import Plan
    from taut.techniques import Technique
    from taut.proof import Evidence

console = Console(highlight=False)


def step(text: str) -> None:
    console.print(f"\n[bold]{text}[/bold]")


def together(wheres: Iterable[str]) -> dict[str, list[str]]:
    """Module paths that differ in one layer number only, by the path with a range in that number's place."""
    groups: dict[str, list[tuple[int, str]]] = {}
    for where in wheres:
        number = re.search(r"\d+", where)
        key = where if number is None else f"{where[: number.start()]}\0{where[number.end() :]}"
        groups.setdefault(key, []).append((int(number.group()) if number else -1, where))
    shown = {}
    for key, members in groups.items():
        numbers = [n for n, _ in members]
        shown[key.replace("\0", _range(numbers))] = [where for _, where in members]
    return shown


def _range(numbers: list[int]) -> str:
    low, high = min(numbers), max(numbers)
    if len(numbers) == 1:
        return str(low)
    if sorted(numbers) == list(range(low, high + 1)):
        return f"{{{low}..{high}}}"
    return "{" + ",".join(str(n) for n in sorted(numbers)) + "}"


def size(count: float, unit: str = "B") -> str:
    for prefix in ("", "K", "M", "G"):
        if count < 1000:
            return f"{count:.3g} {prefix}{unit}"
        count /= 1000
    return f"{count:.3g} T{unit}"


def _sites_table(rows: list[tuple[str, str, str | None]]) -> Table:
    """(rewrite, where, reason or None), alike ones in one row."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("rewrite", "where", "sites", "verdict"):
        table.add_column(name, justify="right" if name == "sites" else "left", overflow="fold")
    alike: dict[tuple[str, str], list[str]] = {}
    for rewrite, where, reason in rows:
        general = re.sub(r"\d+", "N", reason) if reason else ""
        alike.setdefault((rewrite, general), []).append(where)
    reasons = {(r, w): reason for r, w, reason in rows}
    for (rewrite, general), wheres in alike.items():
        for where, members in together(wheres).items():
            reason = reasons[rewrite, members[0]]
            verdict = "[green]applies[/green]" if not general else f"[yellow]refused:[/yellow] {_plain(reason or '')}"
            table.add_row(rewrite, _plain(where), str(len(members)), verdict)
    return table


def _plain(text: str) -> str:
    return text.replace("[", r"\[")


def inspection(found: Inspection, facts: bool = False, graph: bool = False) -> None:
    console.print(
        f"{found.model_class}: {size(found.parameters, '')}parameters; promised outputs: {', '.join(found.outputs)}"
    )
    console.print(_sites_table([(s["rewrite"], s["where"], s["refused"]) for s in found.sites]))
    applies = sum(s["refused"] is None for s in found.sites)
    console.print(
        f"\n{applies} sites apply, {len(found.sites) - applies} are refused. "
        f"After folding {found.idle_parameters:,} norm parameters ({size(found.idle_bytes)}) do nothing."
    )
    for mark, value in found.prior.items():
        console.print(f"note: this checkpoint was rewritten before ({mark}: {value})")
    if found.graph is not None and (graph or facts):
        from taut.printing import columns, text

        console.print(text(found.graph, columns(found.graph) if facts else None), markup=False, soft_wrap=True)


def plan(made: Plan, out: Path | None) -> None:
    rows: list[tuple[str, str, str | None]] = [(s.rewrite, where, None) for s in made.steps for where in s.sites]
    rows += [(r.rewrite, r.where, r.reason) for r in made.refused]
    if rows:
        console.print(_sites_table(rows))
    _absent(made)
    if out is not None:
        console.print(f"plan written to {out}")


def _absent(made: Plan) -> None:
    for rewrite, reason in made.absent.items():
        console.print(f"{rewrite}: {reason}")


def applied(done: Applied) -> None:
    plan(done.plan, None)
    if done.out is None:
        console.print("Nothing applies, so nothing was written.")
        return
    if done.evidence is not None:
        evidence(done.evidence)
    if done.unused_tensors:
        console.print(f"copied as they are, since no parameter reads them: {_plain(', '.join(done.unused_tensors))}")
    if done.left_out_files:
        console.print(f"left out, since they hold the unrewritten weights: {', '.join(done.left_out_files)}")
    for note in done.notes:
        console.print(f"note: {note}")
    console.print(f"[bold]written to {done.out}[/bold]")


def evidence(found: Evidence) -> None:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    rows: list[tuple[str, Any]] = [
        ("the same model", "[green]proved[/green]" if found.passed else "[red]NOT proved[/red]"),
        ("promise", f"{found.exactness} on {', '.join(f'{k} ({v})' for k, v in found.outputs.items())}"),
        ("float64", f"largest difference {found.float64_error:.1e} of the largest value (limit 1e-12)"),
        (found.dtype or "working dtype", f"error {found.error_ratio:.2f} times the original's own (limit 2)"),
        ("tensors", f"{found.tensors_checked} rewritten, each its float64 value rounded once"),
    ]
    if found.unproved:
        rows.append(("unproved", ", ".join(found.unproved)))
    if found.wrong_tensors:
        rows.append(("wrong tensors", ", ".join(found.wrong_tensors)))
    if found.choices_flipped:
        rows.append(("routing", f"{found.choices_flipped} choices would fall otherwise in {found.dtype}"))
    if not found.passed and found.worst:
        rows.append(("first off", found.worst))
    for name, value in rows:
        table.add_row(name, value if name == "the same model" else _plain(str(value)))
    console.print(table)
    for note in found.notes:
        console.print(f"note: {_plain(note)}")


def techniques(rows: list[Technique]) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("kind", "name", "exactness", "what it is", "source"):
        table.add_column(name, overflow="fold")
    for row in rows:
        table.add_row(row.kind, row.name, row.exactness or "", _plain(row.summary), _plain(row.source))
    console.print(table)


def demonstration(shown: Demonstration) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "before", "after"):
        table.add_column(name)
    for label, before, after in shown.rows:
        table.add_row(label, before, after)
    console.print()
    console.print(table)
    console.print(f"\n{shown.verdict}")
