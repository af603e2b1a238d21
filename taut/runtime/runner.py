"""Run a decode program on a CPU: the interpreter's segments, and torch in between where a step has no other word."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from threading import Thread

import numpy as np
import torch
from torch import Tensor

from taut.checkpoint.errors import BadInput
from taut.huge_pages import collapse_meanwhile
from taut.op import nbytes
from taut.ops._numba.kernels import callable_at
from taut.runtime._numba.interpreter import run
from taut.runtime.packing import Packer, Segment
from taut.runtime.placed import LARGE, free_memory, gathered, matrices, stored
from taut.runtime.sampling import Ints, Sampling, as_list
from taut.runtime.steps import Attend, Embed, Glu, Linear, Program, Step, Torch, View, Weight

CACHE_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Runner:
    """A program with its caches and its memory, for at most `max_batch` rows at once.

    `caches` holds (keys, values) of every cache layer, (max_batch slots, kv_heads, max_length, d) each, of
    `cache_dtype`: float32, bfloat16 or float16; by default float32. It uses as many threads as torch does when it is
    built. `stepwise` runs one step after the other instead of all in one go, for looking at `buffers` in between.
    Weights are copied onto large pages in the order of reading, compressed without loss where that is faster; where
    memory is short they are moved there as they are, beside the first runs. So are the caches of a slot when half of
    their positions are in use; `settle` waits for it.
    Raises BadInput where the caches do not fit into memory.
    """

    def __init__(
        self, program: Program, max_batch: int = 1, cache_dtype: torch.dtype | None = None, stepwise: bool = False
    ):
        if max_batch < 1:
            raise BadInput(f"a batch of {max_batch}", "take at least 1")
        cache_dtype = cache_dtype or torch.float32
        self.program = program
        self.laid = gathered(program, max_batch, cache_bytes(program, max_batch, cache_dtype))
        self.max_batch, self.threads = max_batch, torch.get_num_threads()
        self.caches = make_caches(program, max_batch, cache_dtype)
        self.packed = Packer(self.laid, max_batch, self.caches).pack(stepwise)
        self.buffers = self.packed.buffers
        self.logits = self.buffers[program.logits]
        self.scores = self.logits.numpy()
        self.vocabulary = vocabulary(program)
        self.scratch = torch.empty(self.threads, self.packed.scratch)
        self.counter = np.zeros(1, np.int64)
        self.rows = np.zeros((3, max_batch), np.int64)
        self.interpret = callable_at(run(), 12)
        self.tables = self.packed.steps.ctypes.data, self.packed.attends.ctypes.data
        self.room = (
            *(row.ctypes.data for row in self.rows),
            self.scratch.data_ptr(),
            4 * self.scratch.stride(0),
            self.counter.ctypes.data,
        )
        self.half_full: set[int] = set()
        self.settling: list[Thread] = []
        self._move(stored(self.laid))

    def run(self, tokens: Ints, positions: Ints, slots: Ints) -> Tensor:
        """Float32 logits (rows, vocabulary), which the next run overwrites.

        Row i puts `tokens[i]` at `positions[i]` of the sequence in slot `slots[i]`. Rows of one slot may stand at
        successive positions. Raises BadInput for what lies outside of the program's bounds.
        """
        return self.logits[: self._step(tokens, positions, slots)]

    def draw(self, tokens: Ints, positions: Ints, slots: Ints, how: Sampling) -> list[int]:
        """The same, and the token that follows in each row; the row of slot i draws from stream i.

        What reads all of a model leaves a cache without any of torch in it: the likeliest token, which costs little
        else, is sought without it.
        """
        rows = self._step(tokens, positions, slots)
        if not how.temperature:
            return self.scores[:rows].argmax(-1).tolist()
        return how.draw(self.logits[:rows], slots, positions)

    def _step(self, *given: Ints) -> int:
        rows = self._take(*given)
        for segment in self.packed.segments:
            self._play(segment, rows)
        return rows

    def write(self, layer: int, slot: int, start: int, keys: Tensor, values: Tensor) -> None:
        """Put keys (kv_heads, n, d) and values (kv_heads, n, dv) of positions from `start` on into a slot."""
        for cache, new in zip(self.caches[layer], (keys, values), strict=True):
            cache[slot, :, start : start + new.shape[1]] = new

    def bytes_a_token(self, positions: list[int]) -> int:
        """Bytes of weights and caches that a run of rows at these positions reads."""
        return bytes_read(self.laid.steps, self.caches, positions)

    @property
    def compression(self) -> float:
        """The bytes of all weights that are multiplied by, of those that they have as they are stored; at most 1."""
        laid, given = (sum(map(weight_bytes, matrices(program, False))) for program in (self.laid, self.program))
        return min(laid / given, 1.0) if given else 1.0

    def _take(self, *given: Ints) -> int:
        lists = checked_rows(given, (self.vocabulary, self.program.max_length, self.max_batch))
        rows = len(lists[0])
        self.rows[:, :rows] = lists
        self._settle_full(*lists[1:])
        return rows

    def settle(self) -> None:
        """Wait until what is moving onto large pages is there."""
        for thread in self.settling:
            thread.join()

    def _settle_full(self, positions: list[int], slots: list[int]) -> None:
        """Large pages for slots as they become half full: sooner, they would take memory that may never be used."""
        for position, slot in zip(positions, slots, strict=True):
            if 2 * position >= self.program.max_length and slot not in self.half_full:
                self.half_full.add(slot)
                self._move([cache[slot] for pair in self.caches for cache in pair])

    def _move(self, tensors: list[Tensor]) -> None:
        """Put tensors onto large pages beside all else, in their order, where they are many bytes."""
        if sum(t.nbytes for t in tensors) >= LARGE:
            self.settling.append(collapse_meanwhile(tensors))

    def _play(self, segment: Segment | Torch, rows: int) -> None:
        if isinstance(segment, Segment):
            self.interpret(*self.tables, segment.first, segment.last, rows, *self.room, self.threads)
            return
        found = segment.run(*(self._view(view, rows) for view in segment.inputs))
        for name, value in zip(segment.outs, found, strict=True):
            self.buffers[name][:rows] = value

    def _view(self, view: View, rows: int) -> Tensor:
        return self.buffers[view.buffer][:rows, view.start : view.stop]


def checked_rows(given: Sequence[Ints], limits: tuple[int | None, int, int]) -> list[list[int]]:
    """Tokens, positions and slots as lists. Raises BadInput for too many rows, and for one beyond its limit."""
    lists = [as_list(values) for values in given]
    rows, most = len(lists[0]), limits[2]
    if not 1 <= rows <= most:
        raise BadInput(f"{rows} rows, where 1 to {most} fit", "split them, or ask for a larger max_batch")
    for name, values, limit in zip(("token", "position", "slot"), lists, limits, strict=True):
        wrong = next((v for v in values if v < 0 or (limit is not None and v >= limit)), None)
        if wrong is not None:
            known = "no negative one is" if limit is None else f"0 to {limit - 1} are"
            raise BadInput(f"{name} {wrong}, where {known} known", f"give another {name}")
    return lists


def check_window(tokens: int, room: int, window: int) -> None:
    """Raises BadInput where tokens do not fit into what room is left of a window."""
    if tokens > room:
        cause = f"{tokens} tokens, where {max(room, 0)} more fit into a window of {window}"
        raise BadInput(cause, "shorten the prompt, or ask for a larger max_length")


def make_caches(program: Program, slots: int, dtype: torch.dtype) -> list[tuple[Tensor, Tensor]]:
    """(keys, values) of every cache layer. Raises BadInput for another dtype, or before taking more than is free."""
    if dtype not in CACHE_DTYPES:
        raise BadInput(f"a cache in {dtype}", "take float32, bfloat16 or float16")
    need, free = cache_bytes(program, slots, dtype), free_memory()
    if free is not None and need > free:
        cause = f"the caches take {need / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free"
        raise BadInput(cause, "take a smaller max_length, max_batch or cache dtype")
    made = lambda heads, size: torch.empty(slots, heads, program.max_length, size, dtype=dtype)  # noqa: E731
    return [(made(heads, d), made(heads, dv)) for heads, d, dv in program.caches]


def cache_bytes(program: Program, slots: int, dtype: torch.dtype) -> int:
    numbers = sum(heads * (d + dv) for heads, d, dv in program.caches)
    return slots * program.max_length * dtype.itemsize * numbers


def vocabulary(program: Program) -> int | None:
    """How many tokens the program knows."""
    return min((len(s.table.data) for s in program.steps if isinstance(s, Embed) and s.table is not None), default=None)


def bytes_read(steps: Iterable[Step], caches: Sequence[tuple[Tensor, Tensor]], positions: list[int]) -> int:
    """Bytes of weights and caches that some steps read in a run of rows at these positions."""
    total = 0
    for step in steps:
        match step:
            case Linear():
                total += weight_bytes(step.weight)
            case Glu():
                total += weight_bytes(step.gate) + weight_bytes(step.up)
            case Embed(table=Weight() as entries):
                total += len(positions) * weight_bytes(entries) // len(entries.data)
            case Attend():
                size = caches[step.layer][0].itemsize * step.kv_heads * (step.d + step.dv)
                total += size * sum(keys_seen(step, position) for position in positions)
    return total


def weight_bytes(weight: Weight) -> int:
    return nbytes(weight.data, weight.scale)


def keys_seen(step: Attend, position: int) -> int:
    return position + 1 - (0 if step.first is None else int(step.first[position]))
