"""What the verbs found, did and proved, for people: the summary first, and nothing wider than the terminal."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from taut import show_cost
from taut.words import console, general, size, together

if TYPE_CHECKING:
    from taut.demonstrate import Demonstration
    from taut.inspection import Inspection
    from taut.on_disk import Applied
    from taut.plans import Plan
    from taut.proof import Evidence
    from taut.rewrite import Rewrite
    from taut.techniques import Technique

LISTED = "fold_norm"
"""The rewrite whose sites `inspect` lists; of the others it gives the numbers, unless asked for all."""

Row = tuple[str, str, str | None]
"""A rewrite, a module path, and the reason why it is refused there."""


def told(what: str | Inspection | Applied | Evidence) -> None:
    """One thing that the demo has to say."""
    from taut.inspection import Inspection
    from taut.on_disk import Applied

    if isinstance(what, str):
        console.print(f"\n[bold]{escape(what)}[/bold]")
    elif isinstance(what, Inspection):
        rows: list[Row] = [(site["rewrite"], site["where"], site["refused"]) for site in what.sites]
        folds = [row for row in rows if row[0] == LISTED]
        _summary(what, sum(row[2] is None for row in folds), len(folds))
        _sites(folds)
    elif isinstance(what, Applied):
        console.print(f"{_count(what.plan.applied, 'norm')} folded, written to {Path(what.out or '').name}/")
    else:
        evidence(what)


def _count(number: int, thing: str) -> str:
    return f"{number:,} {thing}" if number == 1 else f"{number:,} {thing}s"


def _sites(rows: list[Row]) -> None:
    """Every site, grouped by rewrite and verdict; alike ones on one line, a reason under the sites it refuses."""
    for rewrite, group in groupby(rows, key=lambda row: row[0]):
        members = list(group)
        applying = [where for _, where, reason in members if reason is None]
        console.print(f"\n[bold]{rewrite}[/bold]  {len(applying)} of {_count(len(members), 'site')}")
        if applying:
            _verdict("[green]applies[/green]", applying, "")
        for kind in dict.fromkeys(general(reason) for _, _, reason in members if reason):
            refused = [(where, reason) for _, where, reason in members if reason and general(reason) == kind]
            reasons = dict.fromkeys(reason for _, reason in refused)
            said = next(iter(reasons)) if len(reasons) == 1 else f"e.g. {next(iter(reasons))}"
            _verdict("[yellow]refused[/yellow]", [where for where, _ in refused], said)


def _verdict(word: str, wheres: Iterable[str], reason: str) -> None:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for i, where in enumerate(together(wheres)):
        grid.add_row("" if i else word, escape(where))
    if reason:
        grid.add_row("", Padding(f"[dim]{escape(reason)}[/dim]", (0, 0, 0, 2)))
    console.print(Padding(grid, (0, 0, 0, 2)))


def inspection(
    found: Inspection, facts: bool = False, graph: bool = False, everything: bool = False, ops: bool = False
) -> None:
    rows: list[Row] = [(site["rewrite"], site["where"], site["refused"]) for site in found.sites]
    listed = [row for row in rows if row[0] == LISTED]
    _summary(found, sum(row[2] is None for row in listed), len(listed))
    _sites(rows if everything else listed)
    if not everything:
        _others(rows)
    show_cost.floors(found.costs, found.machine, ops)
    if graph or facts:
        from taut.printing import columns, text

        console.print()
        console.print(text(found.graph, columns(found.graph) if facts else None), markup=False, soft_wrap=True)


def _summary(found: Inspection, applies: int, norms: int) -> None:
    console.print(f"[bold]{found.model_class}[/bold]: {size(found.parameters, '')} parameters, {size(found.bytes)}")
    console.print(f"{applies} of {_count(norms, 'norm')} can be folded into the layers behind them.")
    if found.idle_parameters:
        console.print(f"{_count(found.idle_parameters, 'parameter')} ({size(found.idle_bytes)}) then do nothing.")
    for mark, value in found.prior.items():
        _paragraph(f"note: this checkpoint was rewritten before ({mark}: {value})")


def _others(rows: list[Row]) -> None:
    """One line for each rewrite of a checkpoint whose sites are not listed."""
    from taut.rewrite import TAUT, rewrites

    grid, without = Table.grid(padding=(0, 2)), []
    for name, rewrite in rewrites().items():
        if TAUT not in rewrite.forms:
            continue
        found = [reason is None for own, _, reason in rows if own == name]
        verdicts = [applies for applies in found if applies or not rewrite.asked]  # nobody asked, nothing is refused
        if verdicts and name != LISTED:
            grid.add_row("", name, f"{sum(verdicts)} of {_count(len(verdicts), 'site')}", _remarks(rewrite))
        elif not found:
            without.append(name)
    if grid.row_count:
        console.print("\nOther rewrites, each on the model as it is (--all lists their sites):")
        console.print(grid)
    if without:
        _paragraph(f"No place for {', '.join(without)}.")


def _remarks(rewrite: Rewrite) -> str:
    from taut.rewrite import STOCK, Exactness

    exact = rewrite.exactness in (Exactness.BITWISE, Exactness.ALGEBRAIC)
    said = {"taut form": STOCK not in rewrite.forms, "only by name": rewrite.asked, rewrite.exactness.name: not exact}
    return ", ".join(remark for remark, holds in said.items() if holds)


def plan(made: Plan, out: Path | None) -> None:
    rows: list[Row] = [(step.rewrite, where, None) for step in made.steps for where in step.sites]
    rows += [(refusal.rewrite, refusal.where, refusal.reason) for refusal in made.refused]
    order = list(dict.fromkeys(row[0] for row in rows))
    parts = [f"{len(step.sites)} {step.rewrite}" for step in made.steps]
    console.print(f"[bold]plan[/bold] ({made.form} form): {', '.join(parts) or 'nothing applies'}")
    _sites(sorted(rows, key=lambda row: order.index(row[0])))
    for rewrite, reason in made.absent.items():
        console.print(f"\n[bold]{rewrite}[/bold]  no sites: {escape(reason)}")
    show_cost.prices(made)
    if out is not None:
        console.print(f"\nwritten to {escape(str(out))}")


def applied(done: Applied) -> None:
    plan(done.plan, None)
    console.print()
    if done.out is None:
        console.print("Nothing applies, so nothing was written.")
        return
    if done.evidence is not None:
        evidence(done.evidence)
    if done.unused_tensors:
        _paragraph(f"copied as they are, since no parameter reads them: {', '.join(done.unused_tensors)}")
    if done.left_out_files:
        _paragraph(f"left out, since they hold the unrewritten weights: {', '.join(done.left_out_files)}")
    for note in done.notes:
        _paragraph(f"note: {note}")
    console.print(f"\n[bold]written to {escape(str(done.out))}[/bold]")


def _paragraph(text: str) -> None:
    console.print(escape(text))


def evidence(found: Evidence) -> None:
    verdict = "[green]proved[/green]" if found.passed else "[red]NOT proved[/red]"
    console.print(f"[bold]the same model:[/bold] {verdict}")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column(overflow="fold")
    for name, value in _lines(found):
        grid.add_row(name, escape(value))
    console.print(Padding(grid, (0, 0, 0, 2)))
    for note in found.notes:
        _paragraph(f"note: {note}")


def _lines(found: Evidence) -> Iterable[tuple[str, str]]:
    """What was checked, a line each; for outputs that were only compared, nothing."""
    if found.outputs:
        kept = [name if what == "values" else f"{what} of {name}" for name, what in found.outputs.items()]
        yield "promise", f"{_words(found.exactness)}, for {' and '.join(kept)}"
        yield "float64", f"largest difference {found.float64_error:.1e} of the largest value (limit 1e-12)"
        yield found.dtype, f"error {found.error_ratio:.2f} times the original's own (limit 2)"
        yield "tensors", f"{found.tensors_checked} rewritten, each its float64 value rounded once"
    yield from _losses(found.bounds)
    if found.unproved:
        yield "unproved", ", ".join(found.unproved)
    if found.wrong_tensors:
        yield "wrong", ", ".join(found.wrong_tensors)
    if found.choices_flipped:
        yield "routing", f"{found.choices_flipped} choices would fall otherwise in {found.dtype}"
    if not found.passed and found.worst:
        yield "first off", found.worst


def _losses(bounds: dict[str, float]) -> Iterable[tuple[str, str]]:
    """What each lossy rewrite costs, as `taut.lossy` measured it."""
    for name in dict.fromkeys(key.partition(".")[0] for key in bounds):
        cost = {key.partition(".")[2]: value for key, value in bounds.items() if key.startswith(name + ".")}
        said = [f"divergence {cost['divergence']:.1e}"]
        if "of_noise" in cost:
            said.append(f"{cost['of_noise']:.2f} times that of noise as large (limit 2)")
        if "perplexity_rise" in cost:
            said.append(f"perplexity {cost['perplexity_rise']:+.2%}, give or take {cost['standard_error']:.2%}")
        yield name, "; ".join(said)


def _words(exactness: str) -> str:
    from taut.rewrite import Exactness

    return f"{exactness}: {Exactness[exactness].value}"


def techniques(rows: list[Technique]) -> None:
    from taut.techniques import KINDS

    for kind, group in groupby(rows, key=lambda row: row.kind):
        console.print(f"\n[bold]{KINDS[kind]}[/bold]")
        for row in group:
            promise = f"  [dim]{row.exactness}[/dim]" if row.exactness else ""
            console.print(f"  [bold]{row.name}[/bold]{promise}")
            console.print(Padding(f"{escape(row.summary)}\n[dim]{escape(row.source)}[/dim]", (0, 0, 0, 4)))


def demonstration(shown: Demonstration) -> None:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for name in ("", "before", "after"):
        table.add_column(name)
    for label, before, after in shown.rows:
        table.add_row(label, before, after)
    console.print(table)
    console.print(f"\n{escape(shown.verdict)}")
