"""Floors, machines and prices, for people."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from taut.cost import Cost, Item, Kind
from taut.machine import Machine
from taut.plans import Plan, Price
from taut.words import console, duration, size, together

if TYPE_CHECKING:
    from taut.benchmark import Bench

LEAST_SHARE = 0.005
"""Kinds of calls below this share of the whole are told as one."""


def machines(known: Mapping[str, Machine], here: Mapping[str, Machine | None]) -> None:
    """Those that taut ships, and what was measured on the devices of this machine."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for heading in ("name", "machine"):
        table.add_column(heading, overflow="fold")
    for heading in ("bandwidth", "bfloat16", "float32", "memory"):
        table.add_column(heading, justify="right", no_wrap=True)
    for name, machine in known.items():
        table.add_row(name, machine.name, *_figures(machine))
    measured = {"this" if device == "cpu" else device: found for device, found in here.items() if found is not None}
    for name, machine in measured.items():
        table.add_row(name, f"{machine.name} (measured)", *_figures(machine))
    console.print(table)
    if len(measured) < len(here):
        console.print("\nThis machine has not been measured: taut machines --measure (about half a minute)")
    for name, machine in measured.items():
        console.print(f"\n[bold]{name}[/bold]: {escape(machine.name)}, measured")
        console.print(_sources(machine))


def _sources(machine: Machine) -> Table:
    rows = [("bandwidth", machine.bandwidths["memory"], "B/s"), ("a call", machine.call, "s")]
    rows += [(name, figure, "FLOP/s") for name, figure in machine.peaks.items()]
    grid = Table.grid(padding=(0, 2))
    for name, figure, unit in rows:
        if figure is not None:
            value = duration(figure.value) if unit == "s" else size(figure.value, unit)
            grid.add_row("", name, value, f"[dim]{escape(figure.source)}[/dim]")
    return grid


def _figures(machine: Machine) -> tuple[str, ...]:
    peaks = [machine.peaks.get(name) for name in ("bfloat16", "float32")]
    memory = machine.capacities.get("memory")
    shown = [size(peak.value, "FLOP/s") if peak else "" for peak in peaks]
    return size(machine.bandwidths["memory"].value, "B/s"), *shown, size(memory.value) if memory else ""


def floors(costs: Sequence[Cost], machine: Machine | None, ops: bool = False) -> None:
    """What each pass must take on a machine, and which calls take it."""
    if machine is None:
        told = "; ".join(f"{size(c.fused.bytes)} and {size(c.work.flops, 'FLOP')} a {c.title}" for c in costs)
        console.print(f"\n{told}.\nHow long that takes: --machine NAME, or taut machines --measure.")
        return
    origin = machine.bandwidths["memory"].origin
    console.print(f"\n[bold]floors[/bold] on {escape(machine.name)} ({origin}), batch 1")
    for cost in costs:
        _floor(cost, machine)
        table = _ops(cost, machine) if ops else _kinds(cost.kinds(machine))
        console.print(Padding(table, (0, 0, 0, 2)))


def _floor(cost: Cost, machine: Machine) -> None:
    context = f" behind {cost.workload.context} tokens" if cost.workload.context else ""
    need = f"{size(cost.fused.bytes)}, {size(cost.work.flops, 'FLOP')}"
    console.print(f"\n{cost.title}{context}: floor [bold]{duration(cost.floor(machine))}[/bold] ({need})")
    apart = f"{duration(cost.one_by_one(machine))} in {len(cost.items)} calls, each from memory to memory:"
    console.print(f"[dim]{apart}[/dim]")


def _kinds(kinds: list[Kind]) -> Table:
    grid = _grid()
    large = [kind for kind in kinds if kind.share >= LEAST_SHARE]
    small = kinds[len(large) :]
    if len(small) == 1:
        large, small = kinds, []
    for kind in large:
        _row(grid, kind.kind, kind.calls, kind.work.bytes, kind.work.flops, kind.seconds, kind.share)
    if small:
        calls, bytes, flops, seconds, share = (
            sum(parts)
            for parts in zip(*((k.calls, k.work.bytes, k.work.flops, k.seconds, k.share) for k in small), strict=True)
        )
        _row(grid, f"{len(small)} others", calls, bytes, flops, seconds, share)
    return grid


def _ops(cost: Cost, machine: Machine) -> Table:
    """Calls that are alike but for the layer they stand in are one row."""
    whole, grid = cost.one_by_one(machine), _grid()
    alike: dict[tuple, list[Item]] = {}
    for item in cost.items:
        alike.setdefault((item.kind, item.work, item.where.rpartition(".")[2]), []).append(item)
    for (kind, work, _), items in sorted(alike.items(), key=lambda row: -sum(i.seconds(machine) for i in row[1])):
        n, seconds = len(items), sum(item.seconds(machine) for item in items)
        places = ", ".join(together(dict.fromkeys(item.where for item in items)))
        label = f"{kind} [dim]{escape(places)}[/dim]"
        _row(grid, label, n, n * work.bytes, n * work.flops, seconds, seconds / whole if whole else 0)
    return grid


def _grid() -> Table:
    grid = Table.grid(padding=(0, 2))
    grid.add_column(overflow="fold")
    for _ in range(5):
        grid.add_column(justify="right", no_wrap=True)
    return grid


def _row(grid: Table, label: str, calls: int, bytes: float, flops: float, seconds: float, share: float) -> None:
    grid.add_row(label, f"{calls}x", size(bytes), size(flops, "FLOP"), duration(seconds), f"{share:.1%}")


def prices(plan: Plan) -> None:
    """What the steps of a plan save, those that save most first."""
    if not plan.prices:
        return
    console.print(
        f"\n[bold]predicted on {escape(plan.machine or '')}[/bold], batch 1, every call from memory to memory"
    )
    for workload in dict.fromkeys(price.workload for price in plan.prices):
        grid = _grid()
        for price in (p for p in plan.prices if p.workload == workload):
            calls = f"{-price.calls:+d} calls" if price.calls else ""
            saved = f"{size(price.bytes)} saved" if price.bytes >= 0 else f"{size(-price.bytes)} more"
            sign = "-" if price.seconds >= 0 else "+"
            change = f"{sign}{duration(abs(price.seconds))}", f"{-price.share:+.1%}"
            grid.add_row(price.rewrite, calls, saved, *change, _measured(price))
        console.print(f"\n{workload}")
        console.print(Padding(grid, (0, 0, 0, 2)))
    if plan.measured:
        console.print(f"\nmeasured {escape(plan.measured)}; what is not measured the engine does by itself")


def _measured(price: Price) -> str:
    if price.measured_before is None or price.measured_after is None:
        return ""
    verdict = "" if price.kept else ": dropped"
    return f"measured {duration(price.measured_before)} to {duration(price.measured_after)}{verdict}"


def bench(found: Bench) -> None:
    """Parity first, then the times; nothing but the reason where parity failed."""
    parity = found.parity
    worst = "not a number" if parity.worst is None else f"{parity.worst:.3g}"
    verdict = "[green]the same model[/green]" if parity.passed else "[red]NOT the same model[/red]"
    console.print(f"{verdict}, {parity.promise}: {parity.steps} steps, worst {worst} (limit {parity.limit:g})")
    if parity.rise is not None and parity.standard_error is not None:
        rise = f"perplexity {parity.rise:+.2%}, give or take {parity.standard_error:.2%}"
        console.print(f"  divergence {parity.divergence:.1e}, {worst} times that of noise as large; {rise}")
    for excuse in parity.excused:
        margin = f"float64 margin {excuse.margin:.1e}, transformers' own error {excuse.error:.1e}"
        console.print(f"  excused: another token at step {excuse.step}, {margin}")
    if not parity.passed:
        console.print(escape(parity.reason))
    for name, reason in found.failed.items():
        console.print(f"[yellow]{escape(name)} could not run[/yellow]: {escape(reason)}")
    for workload in dict.fromkeys(row.workload for row in found.rows):
        rows = [row for row in found.rows if row.workload == workload]
        base = next(row.seconds for row in rows if row.runner == "transformers")
        length = f" of {found.prompt}" if workload == "prefill" else f" behind {found.prompt} tokens"
        console.print(f"\n[bold]{workload}[/bold]{length}, {found.weights} weights")
        table = Table(box=None, pad_edge=False, header_style="dim")
        for heading in ("", "time", "bandwidth", "rate", "slack", "speed-up"):
            table.add_column(heading, justify="right" if heading else "left", no_wrap=True)
        for row in rows:
            rates = size(row.bytes / row.seconds, "B/s"), size(row.flops / row.seconds, "FLOP/s")
            slack = f"{row.slack:.2f}" + (" cache" if row.cached else "")
            table.add_row(row.runner, duration(row.seconds), *rates, slack, f"{base / row.seconds:.2f}x")
        console.print(Padding(table, (0, 0, 0, 2)))
    memory = found.machine.bandwidths["memory"]
    if found.rows and found.compressed:
        console.print(f"\n{found.compressed}")
    if found.rows:
        console.print(f"\n[dim]memory {size(memory.value, 'B/s')}: {escape(memory.source)}[/dim]")
