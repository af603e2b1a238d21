"""Every word of a program as calls of Triton kernels, over buffers of one dtype, of as many rows as are asked for."""

from __future__ import annotations

from math import log

import torch
from torch import Tensor

from taut.ops._triton import choice
from taut.ops._triton.launch import Config
from taut.runtime._triton import launch
from taut.runtime._triton.launch import After, Reach, Stretches
from taut.runtime.packing import padded, places, reads_of
from taut.runtime.steps import Attend, Combine, Embed, Glu, Linear, Normalize, Program, Step, Torch, View

MOST_JOINED, MOST_FEATURES = 16, 1024
"""So many stretches of so many features a product joins itself; each of its programs reads them all."""
NEAR, FAR = Reach(128, 5), Reach()
"""Tiles and stretches of an attention that the product behind it joins, a tile a stretch, and of any other."""
ONE_ROW = {
    (960, 576, False): Config(4, 0, 1024, warps=1),
    (576, 576, False): Config(8, 0, 1024, warps=8),
    (1536, 576, True): Config(2, 0, 1024, warps=1),
    (576, 1536, False): Config(2, 0, 2048, warps=8),
    (49152, 576, False): Config(8, 0, 1024, 2, warps=4),
    (3072, 2048, False): Config(4, 0, 2048, warps=8),
    (2048, 2048, False): Config(2, 0, 2048, warps=2),
    (8192, 2048, True): Config(2, 0, 2048, warps=4),
    (2048, 8192, False): Config(2, 0, 1024, warps=4),
    (128256, 2048, False): Config(4, 0, 2048, warps=4),
    (6144, 4096, False): Config(16, 0, 512, warps=8, ahead=128),
    (4096, 4096, False): Config(8, 0, 1024, warps=4, ahead=512),
    (14336, 4096, True): Config(1, 0, 1024, warps=4),
    (4096, 14336, False): Config(8, 0, 1024, warps=4, ahead=512),
    (128256, 4096, False): Config(4, 0, 1024, warps=4, ahead=512),
}
"""Tile sizes by outputs, inputs and whether the product is gated."""


class Kernels:
    """A program on a device with its buffers; `rows` int64 [3, most rows] are the tokens, positions and slots."""

    def __init__(self, program: Program, caches: list[tuple[Tensor, Tensor]], rows: Tensor, dtype: torch.dtype) -> None:
        self.program, self.caches, self.given, self.device = program, caches, rows, rows.device
        most, on_gpu = rows.shape[1], rows.device.type == "cuda"
        self.pdl = on_gpu and torch.cuda.get_device_capability(rows.device) >= (9, 0)
        self.processors = torch.cuda.get_device_properties(rows.device).multi_processor_count if on_gpu else 4
        self.near, self.far, self.one_row = NEAR, FAR, ONE_ROW
        self.gpu_name = torch.cuda.get_device_name(rows.device) if on_gpu else ""
        made = lambda *size, dtype=dtype: torch.zeros(size, dtype=dtype, device=rows.device)  # noqa: E731
        self.places, width = places(program)
        self.arena = made(most * width)
        self.logits = made(most, program.widths[program.logits], dtype=torch.float32)
        self.best = made(most, launch.STRETCHES, dtype=torch.float32)
        self.best_at = made(most, launch.STRETCHES, dtype=torch.int32)
        attends = [step for step in program.steps if isinstance(step, Attend)]
        room = max((s.heads * (s.dv + 2) for s in attends), default=0)
        self.scratch = made(room * max(MOST_JOINED, self.splits_of_all(most, attends)), dtype=torch.float32)
        self.logs = made(max((s.heads for s in attends), default=0) * MOST_JOINED, dtype=torch.float32)
        self.joins = _joins(program)
        self.left = set(map(id, self.joins.values()))
        counters = max((most * s.kv_heads for s in attends), default=0)
        self.counters = made(counters + most, dtype=torch.int32)

    def few(self, rows: int, furthest: int) -> bool:
        """Whether the products join what attention finds: for one row whose keys have room in that many tiles."""
        return rows == 1 and furthest < self.near.keys * self.near.splits

    def play(self, rows: int, few: bool) -> None:
        """One step of the first rows given."""
        for step in self.program.steps:
            self._step(step, rows, few)

    def draw(self, rows: int, seed: Tensor | None, heat: Tensor) -> None:
        """Each row's token by its logits, the likeliest or, with a seed, drawn; and its position one on."""
        counters = self.counters[len(self.counters) - self.given.shape[1] :]
        tables = self.logits[:rows], self.best, self.best_at, counters
        tokens, positions, slots = self.given
        launch.draw(*tables, tokens, positions, slots, seed, heat, self.pdl)

    def _step(self, step: Step, rows: int, few: bool) -> None:
        def view(place: View | None) -> Tensor | None:
            return None if place is None else self.buffer(place.buffer, rows)[:, place.start : place.stop]

        tokens, positions, slots = self.given
        match step:
            case Embed():
                table, learned = (None if w is None else w.data for w in (step.table, step.positions))
                out = self.buffer(step.out, rows)
                launch.embed(table, learned, tokens, positions, out, step.offset, step.scale, self.pdl)
            case Normalize():
                x, residual = self._view(step.x, rows), view(step.residual)
                launch.normalize(x, step.norm, residual, self.buffer(step.out, rows), self.pdl)
            case Linear():
                after = After(
                    step.bias, None, step.activation or "identity", step.scale, step.softcap, view(step.residual)
                )
                self._product(step, (step.weight.data, None), after, rows, few)
            case Glu():
                after = After(step.gate_bias, step.up_bias, step.activation)
                self._product(step, (step.gate.data, step.up.data), after, rows, few)
            case Combine():
                a, b, out = self._view(step.a, rows), view(step.b), self.buffer(step.out, rows)
                launch.combine(a, b, out, step.scale, step.b_scale, step.product, self.pdl)
            case Attend():
                heads, where = (self._view(step.q, rows), view(step.k), view(step.v)), self.caches[step.layer]
                if few and id(step) in self.left:
                    left = self._left(step)
                    launch.stretch(step, heads, where, positions, slots, left, self.near, self.pdl)
                    return
                # float32 takes twice the registers: 64 keys of it are spilled to memory
                keys = max(16, self.far.keys * 2 // where[0].element_size())
                reach = self.far._replace(keys=keys, splits=self.splits(rows * step.kv_heads))
                given = (*heads, self.buffer(step.out, rows)), where, positions, slots, (self.scratch, self.counters)
                launch.attend(step, *given, reach, self.pdl)
            case Torch():
                found = step.run(*(self._view(place, rows).float() for place in step.inputs))
                for name, value in zip(step.outs, found, strict=True):
                    self.buffer(name, rows).copy_(value)

    def _product(
        self, step: Linear | Glu, weights: tuple[Tensor, Tensor | None], after: After, rows: int, few: bool
    ) -> None:
        x, out, norm = self._view(step.x, rows), self.buffer(step.out, rows), step.norm
        config = self.config(weights, rows)
        if rows == 1:
            joined = self.joins.get(id(step)) if few else None
            left = None if joined is None else self._left(joined)
            launch.one(x, *weights, out, norm, after, config, self.pdl, left)
            return
        if norm is not None and (norm.gain is not None or norm.bias is not None or norm.centred):
            normed = torch.empty(x.shape, dtype=x.dtype, device=x.device)
            launch.normalize(x, norm, None, normed, self.pdl)
            x, norm = normed, None
        launch.many(x, *weights, out, norm, after, config, self.pdl)

    def _left(self, step: Attend) -> Stretches:
        """Where an attention leaves its stretches for the product behind it."""
        return Stretches(self.scratch, self.logs, step.dv, self.near.splits)

    def config(self, weights: tuple[Tensor, Tensor | None], rows: int) -> Config:
        """Tile sizes of a product: the measured ones of this GPU, or some that do."""
        n, k = weights[0].shape
        if rows == 1:
            return one_row(n, k, weights[1] is not None, self.one_row)
        found = choice.choose("linear" if weights[1] is None else "glu", rows, n, k, self.gpu_name)
        return found if isinstance(found, Config) else some_rows(rows, n, k)

    def splits(self, pairs: int) -> int:
        """Stretches of each of so many pairs of a row and a key head: short texts need one, long ones fill the GPU."""
        longest = -(-self.program.max_length // self.far.least)
        return max(1, min(longest, -(-2 * self.processors // pairs)))

    def splits_of_all(self, most: int, attends: list[Attend]) -> int:
        """Stretches of all rows, at the most, of any attention and any number of rows."""
        each = (rows * self.splits(rows * s.kv_heads) for s in attends for rows in range(1, most + 1))
        return max(each, default=0)

    def buffer(self, name: str, rows: int) -> Tensor:
        """The first rows of a buffer."""
        width = self.program.widths[name]
        if name == self.program.logits:
            return self.logits[:rows]
        step, most = padded(width), self.given.shape[1]
        return self.arena[self.places[name] * most :][: step * most].view(most, step)[:rows, :width]

    def _view(self, place: View, rows: int) -> Tensor:
        return self.buffer(place.buffer, rows)[:, place.start : place.stop]


def _joins(program: Program) -> dict[int, Attend]:
    """The attentions whose stretches the product behind them may join, by that product: few features, in heads of which
    whole ones fill a tile."""
    found: dict[int, Attend] = {}
    readers = [view.buffer for step in program.steps for view in reads_of(step)]
    for step, after in zip(program.steps, program.steps[1:], strict=False):
        if isinstance(step, Attend) and isinstance(after, Linear) and after.norm is None and step.sinks is None:
            width = step.heads * step.dv
            alone = after.x == View(step.out, 0, width) and readers.count(step.out) == 1
            if alone and width <= MOST_FEATURES and step.dv <= 256 and step.dv.bit_count() == 1:
                found[id(after)] = step
    return found


def one_row(n: int, k: int, gated: bool, sizes: dict[tuple[int, int, bool], Config]) -> Config:
    """Tile sizes for one row: those that were the fastest on an H200 at the nearest of the sizes tried."""
    near = (size for size in sizes if size[2] == gated)
    return sizes[min(near, key=lambda size: abs(log(size[0] / n)) + 2 * abs(log(size[1] / k)))]


def some_rows(rows: int, n: int, k: int) -> Config:
    """Tile sizes for several rows on a GPU that was not measured: the inputs split until some hundred programs run."""
    tokens = 16 if rows <= 16 else 64
    split = max(1, min(8, 256 // -(-n // 64), k // 256))
    return Config(64, tokens, 64, split, 3, 4, 128)
