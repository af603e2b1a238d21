"""The proof of a plan, lossy rewrites included.

A lossy rewrite loses accuracy in the values of some parameters and is exact apart from that. So a plan is proved in
stretches: up to the loss it computes what the original does, behind it what the graph before it computes with the
values that are left; each stretch is ALGEBRAIC. The loss itself is measured, as divergence from the model that lost
nothing, and compared with that of random noise of the format's own accuracy. On a text the perplexity is measured too.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taut.checkpoint import BadInput
from taut.graph import Graph
from taut.plans import Plan, apply_step, form_of
from taut.proof import AS_GOOD, Evidence, Inputs, prove
from taut.quality import Quality, over
from taut.rewrite import Bound, Exactness, Site, rewrites

if TYPE_CHECKING:
    from taut.opened import Opened

DRAWS = 4
"""Of the noise; its divergence is the mean over them."""

CHANCE = 2.0
"""A perplexity is too high where it is so by more than this many standard errors."""

LOGITS, IDS = "logits", "input_ids"

ROW, ROWS = 256, 16
"""A text is read in so many rows of so many tokens, at most."""


@dataclass(frozen=True)
class Loss:
    """One lossy step: the graph before it, and the same graph with what is left of its values."""

    name: str
    bound: Bound
    before: Graph
    left: Graph
    sites: tuple[Site, ...]

    def noisy(self, seed: int) -> Graph:
        values: dict = {}
        for site in self.sites:
            values |= self.bound.noise(self.before, site, seed)
        return with_values(self.before, values)


Stretch = tuple[Graph, Graph]


def stretches(raw: Graph, lifted: Graph, plan: Plan) -> tuple[list[Stretch], list[Loss]]:
    """The exact stretches of a plan, and the losses between them. Raises BadPlan where it does not fit."""
    start, now, form = raw, lifted, form_of(plan.form)
    exact: list[Stretch] = []
    losses: list[Loss] = []
    for step in plan.steps:
        before, rewrite = now, rewrites().get(step.rewrite)
        now = apply_step(before, step, plan.form)
        if rewrite is not None and rewrite.bound is not None:
            sites = tuple(site for site in rewrite.find(before, form) if site.where in step.sites)
            left = _left(before, now, rewrite.bound, sites)
            exact.append((start, before))
            losses.append(Loss(step.rewrite, rewrite.bound, before, left, sites))
            start = left
    if form.stock:
        stock = raw.copy()
        stock.values = dict(now.values)
        now = stock
    return [*exact, (start, now)], losses


def _left(before: Graph, after: Graph, bound: Bound, sites: Iterable[Site]) -> Graph:
    values: dict = {}
    for site in sites:
        values |= bound.decoded(site, after.values.__getitem__)
    return with_values(before, values)


def with_values(graph: Graph, values: Mapping) -> Graph:
    """The same graph with other values of some parameters."""
    changed = graph.copy()
    changed.values.update(values)
    return changed


def prove_plan(
    raw: Graph,
    lifted: Graph,
    plan: Plan,
    inputs: Sequence[Inputs],
    *,
    promises: Mapping[str, str],
    exactness: Exactness,
    written: Mapping[str, Tensor] | None = None,
    spare: Iterable[Inputs] = (),
    movement: bool = True,
    noise: bool = True,
    text: Sequence[Inputs] = (),
) -> tuple[Evidence, Graph]:
    """Prove a plan on the graph as traced and as lifted; the evidence, and the graph as rewritten.

    As `prove`; `text` are inputs on which the perplexity is measured, `noise=False` leaves out the comparison with
    noise, for a model whose twin passed it.
    """
    exact, losses = stretches(raw, lifted, plan)
    last = exact[-1][1]
    every = itertools.tee(spare, len(exact))
    found = [
        prove(
            one,
            two,
            inputs,
            promises=promises,
            exactness=Exactness.ALGEBRAIC if losses else exactness,
            written=written if two is last else None,
            spare=more,
            movement=movement and two is last,
        )
        for (one, two), more in zip(exact, every, strict=True)
    ]
    evidence = _joined(found)
    for loss in losses:
        _measure(loss, text or inputs, bool(text), noise, evidence)
    evidence.exactness = exactness.name
    return evidence, last


def _joined(found: Sequence[Evidence]) -> Evidence:
    """One evidence of several stretches: it fails where one of them does, and names that one's place."""
    joined = found[-1]
    joined.worst = next((e.worst for e in found if not e.passed), joined.worst)
    joined.passed = all(e.passed for e in found)
    joined.float64_error = max(e.float64_error for e in found)
    joined.error_ratio = max(e.error_ratio for e in found)
    joined.choices_flipped = max(e.choices_flipped for e in found)
    return joined


def _measure(loss: Loss, inputs: Sequence[Inputs], is_text: bool, noise: bool, evidence: Evidence) -> None:
    """Add what a loss amounts to, and fail where it is more than promised."""
    quality = _quality(loss.before, loss.left, inputs)
    told = {"divergence": quality.divergence}
    wrong = []
    if noise:
        few = inputs[:1] if is_text else inputs
        drawn = [_quality(loss.before, loss.noisy(seed), few).divergence for seed in range(DRAWS)]
        told["of_noise"] = _quality(loss.before, loss.left, few).divergence / (sum(drawn) / DRAWS)
        wrong += [f"diverges {told['of_noise']:.1f} times as far as noise"] * (not told["of_noise"] <= AS_GOOD)
    if is_text and quality.tokens is not None:
        rise, limit = quality.tokens.perplexity_ratio - 1, loss.bound.perplexity
        told |= {"perplexity_rise": rise, "standard_error": quality.tokens.rise_error}
        if limit is not None and not rise - CHANCE * quality.tokens.rise_error <= limit:
            wrong.append(f"raises the perplexity by {rise:.2%}, promised were {limit:.1%}")
    evidence.bounds |= {f"{loss.name}.{name}": value for name, value in told.items()}
    evidence.notes += [f"{loss.name} {what}" for what in wrong]
    evidence.passed = evidence.passed and not wrong


@dataclass
class Measured:
    """`divergence` is KL in nats a token where there are logits, else the relative squared error of all outputs."""

    divergence: float
    tokens: Quality | None = None


def _quality(before: Graph, after: Graph, inputs: Sequence[Inputs]) -> Measured:
    runs = ((before.run(i, float64=True), after.run(i, float64=True), i) for i in inputs)
    if LOGITS in before.outputs and all(IDS in i and i[IDS].shape[1] > 1 for i in inputs):
        with torch.no_grad():
            quality = over((one[LOGITS], two[LOGITS], i[IDS]) for one, two, i in runs)
        return Measured(quality.kl, quality)
    off = size = 0.0
    with torch.no_grad():
        for one, two, _ in runs:
            for name, true in one.items():
                finite = torch.isfinite(true)
                off += (two[name][finite] - true[finite]).square().sum().item()
                size += true[finite].square().sum().item()
    return Measured(off / size if size else 0.0)


def text_inputs(opened: Opened, file: Path | None) -> list[Inputs]:
    """A text as inputs of a checkpoint's model; by default the one that comes with taut, if there is a tokenizer.

    Raises BadInput for a file that cannot be read, has too few tokens, or has some that the model does not know.
    """
    from taut.redundancy import ids_of

    window = getattr(opened.config.get_text_config(), "max_position_embeddings", None)
    length = min(ROW, window) if isinstance(window, int) and window > 1 else ROW
    made = opened.inputs()
    if not set(made) <= {IDS, "attention_mask"} or IDS not in made:
        return []
    chosen = file or Path(str(resources.files("taut") / "demo" / "heldout.txt"))
    try:
        rows = ids_of(opened.checkpoint.path, chosen, length)[:ROWS]
    except (OSError, ValueError, ImportError) as error:
        if file is None:
            return []
        raise BadInput(f"{file} cannot be measured on: {error}", "give a longer text, and a tokenizer") from error
    known = opened.config.get_text_config().vocab_size
    if max(int(ids.max()) for ids in rows) >= known:
        raise BadInput(f"the tokenizer has tokens beyond the model's {known}", "give the model's own tokenizer")
    masked = "attention_mask" in made
    return [{IDS: ids} | ({"attention_mask": torch.ones_like(ids)} if masked else {}) for ids in rows]
