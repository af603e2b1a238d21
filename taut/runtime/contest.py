"""A plan's steps against each other on the engine: what is timed is the compiled program with and without a step."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from taut.checkpoint.errors import BadInput
from taut.graph import Graph
from taut.lift import lift
from taut.lossy import with_values
from taut.plans import Step, apply_step, form_of
from taut.prices import Measured, timed
from taut.rewrite import rewrites
from taut.runtime.engine import Engine
from taut.runtime.exporting import CannotCompile, bind, module_step, step_graph, window
from taut.runtime.lower import CannotLower, lower
from taut.runtime.prepare import fused, tidied
from taut.runtime.replay import structure_alone

POSITIONS = 256
PROMPT, TOKENS = 64, 8
"""A run is so many decoding steps behind a prompt."""


class EngineContest:
    """A decoding step as it is, with the steps of a plan that were taken. Raises BadInput where there is no engine."""

    workload: str | None = "decode"
    told = f"on the engine, {TOKENS} decoding steps behind {PROMPT} tokens, or as many as the window has"

    def __init__(self, lifted: Graph, form: str) -> None:
        self.graph, self.form = lifted, form
        self.engine = _engine(lifted)

    def candidate(self, step: Step) -> Graph | None:
        """The graph with one more step; None for what the engine does by itself. Raises BadPlan where it does not fit.

        What is lossy is put in as values, which are kept as codes.
        """
        after, bound = apply_step(self.graph, step, self.form), rewrites()[step.rewrite].bound
        if bound is None:
            return None if structure_alone(self.graph, after) else after
        values: dict = {}
        for site in rewrites()[step.rewrite].find(self.graph, form_of(self.form)):
            if site.where in step.sites:
                values |= bound.decoded(site, after.values.__getitem__)
        return with_values(self.graph, values)

    def compare(self, candidate: Graph) -> Measured:
        other = _engine(candidate)
        return timed(lambda: _run(self.engine), lambda: _run(other))

    def take(self, candidate: Graph) -> None:
        self.graph, self.engine = candidate, _engine(candidate)


def engine_contest(model: Any, form: str) -> EngineContest:
    """For a module or an opened checkpoint. Raises BadInput where its step cannot be compiled."""
    if isinstance(model, nn.Module):
        positions = min(POSITIONS, window(getattr(model, "config", None), None))
        return EngineContest(lift(tidied(module_step(model, positions))), form)
    from taut.shrink.weights import cast_weights

    graph = step_graph(cast_weights(model.meta, torch.float32), min(POSITIONS, window(model.config, None)))
    stored = {
        n: t.to(model.dtype) if t.is_floating_point() else t for n, t in graph.tensors.items() if n in graph.values
    }
    bind(graph, stored | dict(model.buffers()))
    graph.read = model.located.read
    return EngineContest(lift(tidied(graph)), form)


def _engine(lifted: Graph) -> Engine:
    try:
        engine = Engine(lower(fused(lifted)))
    except CannotLower as error:
        raise CannotCompile(f"the model's step cannot be lowered: {error}", "measure without the engine") from error
    engine.prefill([0] * _prompt(engine))
    return engine


def _prompt(engine: Engine) -> int:
    """Raises BadInput for a window that has no room for the tokens that are timed."""
    room = min(PROMPT, engine.max_length - TOKENS)
    if room < 1:
        raise BadInput(f"the model's window has {engine.max_length} positions", "measure a longer one")
    return room


def _run(engine: Engine) -> None:
    engine.lengths[0] = _prompt(engine)
    for _ in range(TOKENS):
        engine.decode([0])
