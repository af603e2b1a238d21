"""Where the time of a decoding step goes, layer by layer: in the compiled program, and in the original's modules.

The program is timed a step at a time, which costs each a start of its threads (some microseconds) that they share when
the program runs in one piece. The original's layers are timed by hooks. A layer's slack is its time over that of
reading what it reads: its parameters or, in the program, their copies, which may be compressed.
"""

from __future__ import annotations

import itertools
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from statistics import median
from typing import TYPE_CHECKING, Any

from torch import nn

from taut.runtime.runner import Runner, bytes_read
from taut.runtime.steps import Attend, Program, Step, Torch

if TYPE_CHECKING:
    from taut.runtime.engine import Engine

ATTEND = 3
"""Records of the interpreter that an attention takes: turn, attend, merge."""

LEAST = 4096
"""Bytes below which the time is that of a call, and no slack is told."""

LAYER = re.compile(r"^(.*?\.\d+)(?:\.|$)")
ROUNDS = 9


@dataclass(frozen=True)
class Layer:
    """Median seconds of a decoding step in one layer, before and after, and the bytes that it reads then.

    `before` is None for what is no module of its own in the original.
    """

    name: str
    before: float | None
    after: float
    bytes_before: int
    bytes_after: int

    def slack(self, bandwidth: float) -> tuple[float | None, float | None]:
        """Before and after, time over the least time to read the bytes; None where nothing was timed or hardly read."""
        before = self.before * bandwidth / self.bytes_before if self.before and self.bytes_before >= LEAST else None
        return before, self.after * bandwidth / self.bytes_after if self.bytes_after >= LEAST else None

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def layer_of(where: str) -> str:
    """A module path up to its layer's number; the whole path where it is in none."""
    found = LAYER.match(where)
    return found[1] if found else where


def layers(engine: Engine, model: nn.Module, step: Callable[[], object], position: int) -> list[Layer]:
    """Of an engine's program and of the model it was compiled from, which `step` takes one token further.

    The program runs at `position`, whose past need not hold anything.
    """
    after, read = _of_program(engine, position)
    before = _of_modules(model, list(after), step)
    modules = dict(model.named_modules())
    held = {name: _held(modules[name]) if name in modules else 0 for name in after}
    return [Layer(name, before.get(name), seconds, held[name], read[name]) for name, seconds in after.items()]


def _of_program(engine: Engine, position: int) -> tuple[dict[str, float], dict[str, int]]:
    """Seconds and bytes by layer, in the order in which the layers run."""
    clock = _Clock(engine.program)
    wheres = [layer_of(engine.program.names.get(_out(step), "")) for step in engine.program.steps]
    read = dict.fromkeys(wheres, 0)
    for where, count in zip(wheres, clock.reads(position), strict=True):
        read[where] += count
    rounds = []
    for _ in range(ROUNDS + 1):
        seconds = dict.fromkeys(wheres, 0.0)
        for where, spent in zip(wheres, clock.times(position), strict=True):
            seconds[where] += spent
        rounds.append(seconds)
    return {where: median(seconds[where] for seconds in rounds[1:]) for where in read}, read


def _out(step: Step) -> str:
    return step.outs[0] if isinstance(step, Torch) else step.out


class _Clock(Runner):
    """Runs a program a step at a time, and looks at the clock in between."""

    def __init__(self, program: Program) -> None:
        super().__init__(program, 1, stepwise=True)
        for cache in self.caches:
            for part in cache:
                part.zero_()

    def times(self, position: int) -> list[float]:
        """Seconds of every step of the program."""
        rows, segments = self._take([0], [position], [0]), iter(self.packed.segments)
        found = []
        for step in self.program.steps:
            start = time.perf_counter()
            for segment in itertools.islice(segments, ATTEND if isinstance(step, Attend) else 1):
                self._play(segment, rows)
            found.append(time.perf_counter() - start)
        return found

    def reads(self, position: int) -> list[int]:
        """Bytes of weights and caches of every step."""
        return [bytes_read([step], self.caches, [position]) for step in self.laid.steps]


def _held(module: nn.Module) -> int:
    """Bytes of its parameters that a token reads: a row of an embedding, all of the others."""
    tables = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    return sum(p[0].nbytes if id(p) in tables else p.nbytes for p in module.parameters())


def _of_modules(model: nn.Module, names: Sequence[str], step: Callable[[], object]) -> dict[str, float]:
    """Median seconds of a step in each of the modules of these names."""
    modules = {name: module for name, module in model.named_modules() if name in names and name}
    begun: dict[str, float] = {}
    spent: dict[str, list[float]] = {name: [] for name in modules}
    handles = []
    for name, module in modules.items():
        handles.append(module.register_forward_pre_hook(lambda *_, n=name: begun.update({n: time.perf_counter()})))
        handles.append(module.register_forward_hook(lambda *_, n=name: spent[n].append(time.perf_counter() - begun[n])))
    try:
        for _ in range(ROUNDS + 1):
            step()
    finally:
        for handle in handles:
            handle.remove()
    return {name: median(times[1:]) for name, times in spent.items() if len(times) > 1}
