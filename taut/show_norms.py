"""What `inspect --norms` and `inspect --redundancy` print."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.table import Table

from taut.words import console, together

if TYPE_CHECKING:
    from taut.norm_report import NormReport
    from taut.redundancy import EffectiveDims

COLORS = {"free": "green", "can be made free": "cyan", "never free": "yellow"}


def norms(reports: Iterable[NormReport]) -> None:
    """Every norm under its verdict; alike ones on one line, with what removes each part or what keeps it."""
    rows = sorted((list(COLORS).index(report.verdict), _said(report), report.where) for report in reports)
    console.print("\n[bold]norms[/bold]" + ("" if rows else "  none"))
    for (verdict, said), group in groupby(rows, key=lambda row: row[:2]):
        word = list(COLORS)[verdict]
        grid = Table.grid(padding=(0, 2))
        grid.add_column(no_wrap=True)
        grid.add_column(overflow="fold")
        for i, where in enumerate(together(row[2] for row in group)):
            grid.add_row("" if i else f"[{COLORS[word]}]{word}[/]", escape(where))
        for part in said:
            grid.add_row("", f"[dim]{escape(part)}[/dim]")
        console.print(grid)


def _said(report: NormReport) -> tuple[str, ...]:
    needs = (f"with {' '.join(report.needs)}",) if report.needs else ()
    removed = tuple(f"{part}: {rewrite}" for part, rewrite in report.removed.items())
    return needs + removed + tuple(f"{part} stays: {reason}" for part, reason in report.kept.items())


def redundancy(layers: list[EffectiveDims]) -> None:
    """The layers whose inputs leave directions idle, and how many parameters those make redundant."""
    idle = [layer for layer in layers if layer.redundant_parameters]
    total = sum(layer.redundant_parameters for layer in idle)
    console.print(f"\n[bold]redundancy[/bold]  {len(idle)} of {len(layers)} layers, {total:,} parameters")
    table = Table(box=None, pad_edge=False)
    table.add_column("layer")
    for name in ("outputs", "inputs", "rank", "idle"):
        table.add_column(name, justify="right")
    alike = [(layer.outputs, layer.inputs, layer.rank, layer.name) for layer in idle]
    for (outputs, inputs, rank), group in groupby(sorted(alike), key=lambda row: row[:3]):
        names = [row[3] for row in group]
        for where in together(names):
            table.add_row(escape(where), *(f"{n:,}" for n in (outputs, inputs, rank, outputs * (inputs - rank))))
    if idle:
        console.print(table)
