"""The page of `taut inspect --html`."""

from __future__ import annotations

import platform
import re
from collections.abc import Sequence
from datetime import date
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch

from taut.cost import Cost, Item
from taut.machine import Machine, cpu_name
from taut.report import page as html
from taut.report.roofline import Point, roofline
from taut.rewrite import STEP
from taut.words import duration, general, size, together

if TYPE_CHECKING:
    from taut.inspection import Inspection
    from taut.plans import Plan

LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")


def inspection_page(found: Inspection, plan: Plan, after: Sequence[Cost]) -> str:
    """A model as inspected, the plan for it, and what the planned graph costs at the same workloads."""
    rewritten = found.prior.get("taut")
    lead = f"{found.model_class}, {size(found.parameters, '')} parameters, {size(found.bytes)}"
    body = [html.figures(_headline(found, plan)), rewrites(plan)]
    if found.machine is not None:
        body += [costs(found.costs, after, found.machine), layers(found.costs[0], after[0], found.machine)]
    else:
        hint = "Name a machine with --machine, or measure this one with taut machines --measure."
        body.append(html.section("Cost", html.paragraph(hint)))
    body += [evidence(found.evidence, rewritten is not None), environment()]
    return html.page(found.model.rstrip("/").rpartition("/")[2], "taut inspect", lead, body)


def _headline(found: Inspection, plan: Plan) -> list[tuple[str, str]]:
    pairs = []
    if found.machine is not None:
        for cost in found.costs:
            pairs.append((f"floor of a {cost.title} on {found.machine.name}", duration(cost.floor(found.machine))))
    pairs.append(("places where a rewrite applies", f"{plan.applied:,}"))
    pairs.append(("places refused, each with its reason", f"{len(plan.refused):,}"))
    return pairs


def rewrites(plan: Plan) -> str:
    """What applies and what is refused, by rewrite; the reasons open when asked for."""
    names = dict.fromkeys([s.rewrite for s in plan.steps] + [r.rewrite for r in plan.refused])
    parts = []
    for name in names:
        applied = [where for step in plan.steps if step.rewrite == name for where in step.sites]
        refused = [refusal for refusal in plan.refused if refusal.rewrite == name]
        content = html.places("Applies at", together(applied)) if applied else ""
        for kind in dict.fromkeys(general(refusal.reason) for refusal in refused):
            alike = [refusal for refusal in refused if general(refusal.reason) == kind]
            same = len({refusal.reason for refusal in alike}) == 1
            reason = f"Refused: {'' if same else 'for instance, '}{alike[0].reason}"
            content += html.places(reason, together([refusal.where for refusal in alike]))
        counts = [f"{len(applied)} applied" if applied else "", f"{len(refused)} refused" if refused else ""]
        parts.append(html.fold(name, ", ".join(count for count in counts if count), content))
    absent = ", ".join(plan.absent)
    if absent:
        parts.append(html.fold("No place in this model", f"{len(plan.absent)} rewrites", html.paragraph(absent)))
    where = "To the decoding step when it is compiled" if plan.form == STEP.name else f"In {plan.form} form"
    intro = f"{where}, every rewrite on what the ones before it left."
    return html.section("Applied and refused", html.paragraph(intro), *parts)


def costs(before: Sequence[Cost], after: Sequence[Cost], machine: Machine) -> str:
    """The roofline with every kind of op on it, and the numbers behind it."""
    shown = before[:2]
    points = [point for i, cost in enumerate(shown) for point in _points(cost, machine, bool(i))]
    dtype = max(before[0].items, key=lambda item: item.work.flops).dtype
    peak = (machine.peaks.get(dtype) or machine.peaks["float32"]).value
    bandwidth = machine.bandwidths["memory"].value
    drawn = roofline(peak, bandwidth, points, f"Roofline of {machine.name} with the ops of the model on it")
    kinds = [f"{mark}: {cost.title}" for mark, cost in zip(("filled", "open"), shown, strict=False)]
    caption = (
        f"{machine.name}: {size(bandwidth, 'B/s')}, {size(peak, 'FLOP/s')} in {dtype} "
        f"({machine.bandwidths['memory'].origin}). The area of a point is its share of the time; {', '.join(kinds)}."
    )
    tables = [_kinds(cost, last, machine) for cost, last in zip(before, after, strict=True)]
    return html.section("Roofline", html.figure(drawn, caption), *tables)


def _points(cost: Cost, machine: Machine, open: bool) -> list[Point]:
    rows = [kind for kind in cost.kinds(machine) if kind.work.bytes and kind.seconds]
    return [Point(k.kind, k.work.flops / k.work.bytes, k.work.flops / k.seconds, k.share, open) for k in rows]


def _kinds(before: Cost, after: Cost, machine: Machine) -> str:
    rows = before.kinds(machine)
    lines = [
        (k.kind, f"{k.calls}", size(k.work.bytes), size(k.work.flops, "FLOP"), duration(k.seconds), f"{k.share:.1%}")
        for k in rows
    ]
    apart, floor = before.one_by_one(machine), before.floor(machine)
    told = (
        f"Floor {duration(floor)}. Call by call, each from memory to memory: {duration(apart)} in {len(before.items)} "
        f"calls; after the plan {duration(after.one_by_one(machine))} in {len(after.items)}."
    )
    headings = ("op", "calls", "bytes", "work", "least time", "share")
    title = before.title[0].upper() + before.title[1:]
    listed = html.table(f"Ops of a {before.title}", headings, lines, [kind.share for kind in rows])
    return html.heading(title) + html.paragraph(told) + listed


def layers(before: Cost, after: Cost, machine: Machine) -> str:
    """The floor of each layer and its slack when every call goes to memory; alike layers on one row."""
    had, has = _by_layer(before), _by_layer(after)
    floor = {name: _floor(items, machine) for name, items in had.items()}
    rows: dict[tuple[str, ...], list[str]] = {}
    for name, items in had.items():
        now = has.get(name, [])
        apart = [sum(item.seconds(machine) for item in part) for part in (items, now)]
        slack = [f"{seconds / floor[name]:.3f}" if floor[name] else "" for seconds in apart]
        told = (duration(floor[name]), f"{len(items)}", slack[0], f"{len(now)}", slack[1])
        rows.setdefault(told, []).append(name)
    lines = [(", ".join(together(names)), *told) for told, names in rows.items()]
    headings = ("layer", "floor", "calls before", "slack before", "calls after", "slack after")
    note = (
        f"A {before.title}. The slack is that of calls which each go from memory to memory, at full speed: what fusing "
        "them could gain. Measured slack comes from taut bench."
    )
    return html.section("Layers", html.paragraph(note), html.table("Floor and slack by layer", headings, lines))


def _by_layer(cost: Cost) -> dict[str, list[Item]]:
    groups: dict[str, list[Item]] = {}
    for item in cost.items:
        layer = LAYER.match(item.where)
        groups.setdefault(layer[1] if layer else "outside the layers", []).append(item)
    return groups


def _floor(items: Sequence[Item], machine: Machine) -> float:
    """Weights and caches once, and no less than what computing takes."""
    bytes = sum(item.held for item in items)
    return max(bytes / machine.bandwidths["memory"].value, sum(item.computing(machine) for item in items))


def evidence(record: dict[str, Any] | None, rewritten: bool) -> str:
    """What was proved when the checkpoint was rewritten."""
    if record is None:
        said = "was rewritten, but holds no evidence" if rewritten else "is as it was published: nothing to prove yet"
        return html.section("Evidence", html.paragraph(f"The checkpoint {said}. taut apply proves what it writes."))
    verdict = "proved" if record["passed"] else "NOT proved"
    pairs = [("verdict", f"{verdict}: {record['exactness']}")]
    pairs.append(("float64", f"largest difference {record['float64_error']:.1e} of the largest value, limit 1e-12"))
    pairs.append((str(record["dtype"]), f"error {record['error_ratio']:.2f} times the original's own, limit 2"))
    pairs.append(("tensors", f"{record['tensors_checked']} rewritten, each its float64 value rounded once"))
    return html.section("Evidence", html.facts(pairs), *(html.paragraph(note) for note in record.get("notes", ())))


def environment() -> str:
    pairs = [(name, version(name)) for name in ("taut", "torch", "transformers", "numba")]
    cpu = f"{cpu_name()}, {torch.get_num_threads()} threads"
    pairs += [("Python", platform.python_version()), ("CPU", cpu), ("system", platform.system())]
    return html.section("Environment", html.facts([*pairs, ("date", date.today().isoformat())]))
