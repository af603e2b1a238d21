"""Run a decode program on a GPU: a step of all rows is one CUDA graph, from tokens to tokens."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace

import torch
from torch import Tensor

from taut.checkpoint.errors import BadInput
from taut.ops.sample import sample
from taut.runtime.placed import ON_CPU, check_formats, check_room, dtype_of, matrices, placed
from taut.runtime.plain import Caches, PlainRunner
from taut.runtime.runner import CACHE_DTYPES, checked_rows, vocabulary, weight_bytes
from taut.runtime.sampling import Ints, Sampling, as_list
from taut.runtime.steps import Attend, Embed, Norm, Program, Step, Torch

GRAPHS = 16
"""At most so many captured graphs are kept; the one that was used the longest ago goes first."""


class CudaRunner:
    """A program with its caches on a GPU, for at most `max_batch` rows at once.

    `caches` holds (keys, values) of every cache layer, (max_batch slots, kv_heads, max_length, d) each. Buffers, and by
    default the caches, have the dtype of the weights where these agree, else float32; logits are float32. With
    `capture` False, as on a CPU under Triton's interpreter, the kernels are called one by one. Raises BadInput for
    formats that the kernels lack, for steps that no graph can hold, and before more memory is taken than is free.
    """

    compression = 1.0

    def __init__(
        self,
        program: Program,
        max_batch: int = 1,
        cache_dtype: torch.dtype | None = None,
        device: torch.device | str = "cuda",
        capture: bool = True,
    ) -> None:
        from taut.runtime._triton.kernels import Kernels

        if max_batch < 1:
            raise BadInput(f"a batch of {max_batch}", "take at least 1")
        check_formats(program)
        self.device, self.max_batch, self.capture = torch.device(device), max_batch, capture
        self.here = torch.cuda.device(self.device) if self.device.type == "cuda" else nullcontext()
        self.dtype = dtype_of(program)
        self.vocabulary, self.reads = vocabulary(program), _reads(program)
        self.caches = self._empty_caches(program, cache_dtype or self.dtype)
        self.program = placed(program, self.device)
        self.rows = torch.zeros(3, max_batch, dtype=torch.int64, device=self.device)
        self.seed = torch.zeros((), dtype=torch.int64, device=self.device)
        self.heat = torch.ones((), dtype=torch.float32, device=self.device)
        self.drawn_by = 0, 1.0
        self.furthest = 0
        self.kernels = Kernels(self.program, self.caches, self.rows, self.dtype)
        self.graphs: dict[tuple, torch.cuda.CUDAGraph] = {}
        self.ahead = Ahead(self)

    @torch.no_grad()
    def run(self, tokens: Ints, positions: Ints, slots: Ints) -> Tensor:
        """Float32 logits (rows, vocabulary) on the device, which the next run overwrites.

        Row i puts `tokens[i]` at `positions[i]` of the sequence in slot `slots[i]`, no slot twice. Raises BadInput for
        what lies outside of the program's bounds.
        """
        with self.here:
            rows = self.put(tokens, positions, slots)
            self.play(rows, None)
        return self.kernels.logits[:rows]

    def draw(self, tokens: Ints, positions: Ints, slots: Ints, how: Sampling) -> list[int]:
        """The same, and the token that follows in each row, drawn on the device."""
        with self.here:
            return self.ahead.draw(tokens, positions, slots, how)

    def bytes_a_token(self, positions: list[int]) -> int:
        """Bytes of weights and caches that a run of rows at these positions must read."""
        weights, row, attends = self.reads
        size = self.caches[0][0].itemsize if self.caches else 0
        seen = sum(width * (at + 1 - (first[at] if first else 0)) for width, first in attends for at in positions)
        return weights + row * len(positions) + size * seen

    def put(self, *given: Ints) -> int:
        """Tell the device what the rows are; what fills a batch up to its graph's size repeats the first row."""
        lists = checked_rows(given, (self.vocabulary, self.program.max_length, self.max_batch))
        rows = len(lists[0])
        size = self.size(rows)
        self.furthest = max(lists[1])
        filled = [values + values[:1] * (size - rows) for values in lists]
        self.rows[:, :size] = torch.tensor(filled).to(self.device)
        return rows

    def size(self, rows: int) -> int:
        """How many rows the graph has that serves so many: a power of two, or all."""
        return min(1 << (rows - 1).bit_length(), self.max_batch)

    def play(self, rows: int, how: Sampling | None) -> None:
        """One step of the rows that were put; with `how` the tokens and positions then are the next step's."""
        size = self.size(rows)
        few = self.kernels.few(size, self.furthest)
        if how is not None:
            self._draw_by(how)
            how = replace(how, seed=0, temperature=float(how.temperature > 0))
            self.furthest += 1
        if not self.capture:
            self._steps(size, few, how)
            return
        key = size, few, how
        graph = self.graphs.pop(key, None) or self._captured(size, few, how)
        self.graphs[key] = graph
        if len(self.graphs) > GRAPHS:
            self.graphs.pop(next(iter(self.graphs)))
        graph.replay()

    def _draw_by(self, how: Sampling) -> None:
        """Tell the device seed and temperature, where they are not the last step's."""
        given = how.seed, how.temperature or 1.0
        if given != self.drawn_by:
            self.seed.fill_(given[0])
            self.heat.fill_(given[1])
            self.drawn_by = given

    def _steps(self, size: int, few: bool, how: Sampling | None) -> None:
        self.kernels.play(size, few)
        if how is None:
            return
        if how.top_k is None and how.top_p is None and not how.min_p:
            self.kernels.draw(size, self.seed if how.temperature else None, self.heat)
            return
        tokens, positions, slots = self.rows[:, :size]
        filters = how.top_k, how.top_p, how.min_p
        drawn = sample(self.kernels.logits[:size], self.heat, *filters, self.seed + slots, positions + 1)
        tokens.copy_(drawn)
        positions.add_(1)

    def _captured(self, size: int, few: bool, how: Sampling | None) -> torch.cuda.CUDAGraph:
        """A graph of a step. It runs once before, where kernels are compiled, on rows that are put back after it."""
        kept, graph = self.rows.clone(), torch.cuda.CUDAGraph()
        side = torch.cuda.Stream(self.device)
        side.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(side):
            self._steps(size, few, how)
        torch.cuda.current_stream(self.device).wait_stream(side)
        try:
            with torch.cuda.graph(graph):
                self._steps(size, few, how)
        except RuntimeError as error:
            cause = f"a step cannot be put into a CUDA graph: {str(error).splitlines()[0]}"
            raise BadInput(cause, ON_CPU) from error
        self.rows.copy_(kept)
        return graph

    def _empty_caches(self, program: Program, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
        if dtype not in CACHE_DTYPES:
            raise BadInput(f"a cache in {dtype}", "take float32, bfloat16 or float16")
        sizes = [(self.max_batch, heads, program.max_length, d, dv) for heads, d, dv in program.caches]
        need = sum(slots * heads * length * (d + dv) * dtype.itemsize for slots, heads, length, d, dv in sizes)
        if self.device.type == "cuda":
            check_room(program, need, self.device)
        make = lambda *size: torch.zeros(size, dtype=dtype, device=self.device)  # noqa: E731
        return [(make(*size, d), make(*size, dv)) for *size, d, dv in sizes]


class LongRunner(PlainRunner):
    """A `PlainRunner` on a GPU: products and attention in the dtype of the weights, norms in float32."""

    def __init__(self, program: Program, caches: Caches, dtype: torch.dtype) -> None:
        super().__init__(program, 0, caches, dtype)

    def _step(self, step: Step, buffers: dict[str, Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        if not isinstance(step, Torch):
            super()._step(step, buffers, tokens, positions, slots)
            return
        found = step.run(*(buffers[view.buffer][:, view.start : view.stop].float() for view in step.inputs))
        buffers.update((name, value.to(self.dtype)) for name, value in zip(step.outs, found, strict=True))

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        x = x.float()
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        x = x if norm.gain is None else x * norm.gain
        return (x if norm.bias is None else x + norm.bias).to(self.dtype)


class Ahead:
    """Tokens drawn on the device: the next step is started before this one's tokens are read, on the guess that they
    are what will be asked for. Where they are not, what that step appended lies behind the sequence, and is not read.
    """

    def __init__(self, runner: CudaRunner) -> None:
        self.runner = runner
        pinned = runner.device.type == "cuda"
        self.found = [torch.zeros(runner.max_batch, dtype=torch.int64, pin_memory=pinned) for _ in range(2)]
        self.done = [torch.cuda.Event() for _ in range(2)] if pinned else []
        self.turn, self.started = 0, None

    @torch.no_grad()
    def draw(self, tokens: Ints, positions: Ints, slots: Ints, how: Sampling) -> list[int]:
        runner, places = self.runner, as_list(positions)
        asked = as_list(tokens), places, as_list(slots), how
        if asked != self.started:
            runner.put(tokens, places, slots)
            self._start(len(tokens), how)
        turn, rows = self.turn, len(tokens)
        self.started, goes_on = None, max(places) + 1 < runner.program.max_length
        if goes_on and runner.capture:
            self._start(rows, how)
        if self.done:
            self.done[turn].synchronize()
        drawn = self.found[turn][:rows].tolist()
        if goes_on and runner.capture:
            self.started = drawn, [place + 1 for place in places], asked[2], how
        return drawn

    def _start(self, rows: int, how: Sampling) -> None:
        self.turn = 1 - self.turn
        self.runner.play(rows, how)
        self.found[self.turn][:rows].copy_(self.runner.rows[0, :rows], non_blocking=True)
        if self.done:
            self.done[self.turn].record()


def _reads(program: Program) -> tuple[int, int, list[tuple[int, list[int] | None]]]:
    """Bytes of matrices a step, of an embedding a row, and of every attention its elements a key and first keys."""
    tables = [step.table for step in program.steps if isinstance(step, Embed) and step.table is not None]
    weights = sum(weight_bytes(weight) for weight in matrices(program, looked_up=False))
    attends = [step for step in program.steps if isinstance(step, Attend)]
    firsts = [None if step.first is None else step.first.tolist() for step in attends]
    widths = [step.kv_heads * (step.d + step.dv) for step in attends]
    return weights, sum(weight_bytes(t) // len(t.data) for t in tables), list(zip(widths, firsts, strict=True))
