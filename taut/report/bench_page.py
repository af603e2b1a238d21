"""The page of `taut bench --html`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from taut.report import page as html
from taut.report.inspect_page import environment, rewrites
from taut.report.roofline import Point, roofline
from taut.words import duration, general, size

if TYPE_CHECKING:
    from taut.benchmark import Bench, Timed

HEADINGS = ("runner", "time", "best", "bandwidth", "rate", "slack", "speed-up")


def bench_page(found: Bench) -> str:
    """What was measured, after what was proved; where the proof failed there is no number."""
    lead = f"{found.weights} weights, batch 1, {found.prompt} tokens and {found.tokens} more, on {found.machine.name}"
    body = [html.figures(_headline(found)), _parity(found)] if found.rows else [_parity(found)]
    if found.rows:
        body += [_drawing(found), *(_measured(found, workload) for workload in ("decode", "prefill"))]
        body += [_layers(found), _costs(found)]
    body += [*(rewrites(plan) for plan in found.plans), _fused(found)]
    if found.failed:
        body.append(html.section("Could not run", html.facts(found.failed.items())))
    name = found.model.rstrip("/").rpartition("/")[2]
    return html.page(name, "taut bench", lead, [*body, environment()])


def _headline(found: Bench) -> list[tuple[str, str]]:
    pairs = []
    for workload, what in (("decode", "a decode step"), ("prefill", f"prefill of {found.prompt}")):
        rows = {row.runner: row for row in found.rows if row.workload == workload}
        ours, theirs = rows["taut"], rows["transformers"]
        pairs.append((f"{what} with taut", duration(ours.seconds)))
        pairs.append((f"speed-up of {what} over transformers", f"{theirs.seconds / ours.seconds:.2f}x"))
        pairs.append((f"slack of {what}", f"{ours.slack:.2f}"))
    return pairs


def _parity(found: Bench) -> str:
    parity = found.parity
    verdict = "the same model" if parity.passed else f"NOT the same model: {parity.reason}"
    worst = "not a number" if parity.worst is None else f"{parity.worst:.3g}"
    pairs = [("verdict", verdict), ("promise", parity.promise), ("steps", f"{parity.steps} on the same tokens")]
    pairs.append(("worst step", f"{worst}, limit {parity.limit:g}"))
    if parity.rise is not None and parity.standard_error is not None:
        pairs.append(("divergence", f"{parity.divergence:.1e}, {worst} times that of noise as large"))
        pairs.append(("perplexity", f"{parity.rise:+.2%}, give or take {parity.standard_error:.2%}"))
    for excuse in parity.excused:
        told = f"step {excuse.step}: float64 margin {excuse.margin:.1e} is below transformers' error {excuse.error:.1e}"
        pairs.append(("excused", told))
    return html.section("Evidence", html.facts(pairs))


def _fused(found: Bench) -> str:
    """What the engine runs as one program, and what it leaves to torch, by reason."""
    if not found.apart:
        return html.section("What is fused", html.paragraph("Every step of a token runs in one program."))
    kinds: dict[str, list[str]] = {}
    for reason in found.apart:
        kinds.setdefault(general(reason), []).append(reason)
    told = f"One program runs every step of a token but {len(found.apart)}, which torch runs:"
    rows = [(reasons[0], f"{len(reasons)}") for reasons in kinds.values()]
    return html.section("What is fused", html.paragraph(told), html.table("Left to torch", ("reason", "steps"), rows))


def _drawing(found: Bench) -> str:
    points = []
    for row in found.rows:
        name = f"{row.runner}, {row.workload}"
        points.append(Point(name, row.flops / row.bytes, row.flops / row.seconds, 0.08, row.runner != "taut"))
    dtype = max(found.costs[0].items, key=lambda item: item.work.flops).dtype
    peak = (found.machine.peaks.get(dtype) or found.machine.peaks["float32"]).value
    bandwidth = found.machine.bandwidths["memory"].value
    drawn = roofline(peak, bandwidth, points, f"Roofline of {found.machine.name} with the measured passes under it")
    caption = (
        f"{found.machine.name}: {size(bandwidth, 'B/s')} ({found.machine.bandwidths['memory'].source}), "
        f"{size(peak, 'FLOP/s')} in {dtype}. Filled: taut. On the line is the floor; the way up to it is slack."
    )
    return html.section("Roofline", html.figure(drawn, caption))


def _measured(found: Bench, workload: str) -> str:
    rows = [row for row in found.rows if row.workload == workload]
    base = next(row.seconds for row in rows if row.runner == "transformers")
    lines = [_line(row, base / row.seconds) for row in rows]
    title = "Decode, one token a step" if workload == "decode" else f"Prefill of {found.prompt} tokens"
    measured = [html.table(f"{title}: medians of interleaved rounds", HEADINGS, lines)]
    if workload == "decode" and found.compressed:
        measured.append(html.paragraph(found.compressed + "."))
    return html.section(title, *measured)


def _line(row: Timed, faster: float) -> tuple[str, ...]:
    slack = f"{row.slack:.2f}" + (" (cache)" if row.cached else "")
    rates = size(row.bytes / row.seconds, "B/s"), size(row.flops / row.seconds, "FLOP/s")
    return row.runner, duration(row.seconds), duration(row.best), *rates, slack, f"{faster:.2f}x"


def _layers(found: Bench) -> str:
    """Measured time and slack of each layer of a decoding step; empty where they were not timed."""
    if not found.layers:
        return ""
    bandwidth = found.machine.bandwidths["memory"].value
    lines = []
    for layer in found.layers:
        slack = ["" if one is None else f"{one:.2f}" for one in layer.slack(bandwidth)]
        before = "" if layer.before is None else duration(layer.before)
        lines.append((layer.name or "the model itself", before, slack[0], duration(layer.after), slack[1]))
    headings = ("layer", "before", "slack before", "after", "slack after")
    note = (
        "Before: transformers, timed by hooks. After: taut's program, timed a step at a time, which starts its threads "
        "for each step; in one piece it is faster. Slack is over the time to read the layer's weights and cache."
    )
    listed = html.table("A decoding step, layer by layer, medians", headings, lines)
    return html.section("Slack by layer", html.paragraph(note), listed)


def _costs(found: Bench) -> str:
    """What a pass needs at the least, by op."""
    tables = []
    for cost in reversed(found.costs):
        kinds = cost.kinds(found.machine)
        lines = [(k.kind, f"{k.calls}", size(k.work.bytes), duration(k.seconds), f"{k.share:.1%}") for k in kinds]
        headings = ("op", "calls", "bytes", "least time", "share")
        title = f"Ops of a {cost.title}, in transformers' own dtype"
        tables.append(html.table(title, headings, lines, [kind.share for kind in kinds]))
    return html.section("Floors by op", *tables)
