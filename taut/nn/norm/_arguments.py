from __future__ import annotations

from collections.abc import Sequence


def width(d: int | Sequence[int]) -> int:
    """The features of a norm over the last axis, from their number or from a shape (d,) as torch's norms take it.

    Raises ValueError for a shape of several axes.
    """
    if isinstance(d, int):
        return d
    if len(d) != 1:
        raise ValueError(f"the norm is over the last axis alone, and {tuple(d)} are {len(d)} axes: flatten them first")
    return d[0]


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} is {' or '.join(choices)}, not {value!r}")
