"""Prompts: a program run for many rows at once, as fast as the machine multiplies.

Weights stay as they are stored. Where the processor multiplies bfloat16, a bfloat16 weight is multiplied in it, which
is the model's own arithmetic; all else is multiplied in float32. Sums, norms and softmax are float32, as in decoding.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taut.ops._cpu import address, tag, threads
from taut.ops._dispatch import FEW_TOKENS, many
from taut.ops._numba.products import ACTS
from taut.ops._weights import GROUP, dequantize
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.runtime._numba import prompt as kernels
from taut.runtime.plain import Caches, PlainRunner
from taut.runtime.products import multiplied
from taut.runtime.steps import Attend, Glu, Norm, Program, Rotary, Weight

QUERIES = 128
"""Rows whose scores are held at once: they are in the cache when they are weighed, and few keys behind the row are
multiplied in vain."""


class PromptRunner(PlainRunner):
    """A `PlainRunner` in float32 whose products, norms and attention are made for many rows on a CPU."""

    def __init__(self, program: Program, caches: Caches) -> None:
        super().__init__(program, 0, caches)

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        x = x.contiguous()
        if norm.centred:
            return layer_norm(x, norm.gain, norm.bias, norm.eps)
        y = rms_norm(x, norm.gain, norm.eps)
        return y if norm.bias is None else y.add_(norm.bias)

    def _product(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return self._multiplied(x, weight, bias).float()

    def _multiplied(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        if weight.scale is None:
            return multiplied(x, weight.data, bias)
        if len(x) <= FEW_TOKENS:
            return linear(x.contiguous(), weight.data, bias, weight.scale)
        return multiplied(x, self._wide(weight), bias)

    def _wide(self, weight: Weight) -> Tensor:
        data, scale = weight.data, weight.scale
        if data.dtype != torch.uint8 or scale is None or not scale.is_contiguous():
            return dequantize(data, scale, self.dtype)
        wide = torch.empty(len(data), 2 * data.shape[1])
        groups = wide.numel() // GROUP
        kernels.grouped(address(data), address(scale), groups, address(wide), threads(wide.nbytes), tag(scale))
        return wide

    def _glu(self, step: Glu, x: Tensor) -> Tensor:
        gate = self._multiplied(x, step.gate, step.gate_bias)
        up = self._multiplied(x, step.up, step.up_bias)
        out, (rows, d) = torch.empty(gate.shape), gate.shape
        act, tags = ACTS.index(step.activation), (tag(gate), tag(up))
        kernels.gated(address(gate), address(up), address(out), rows, d, act, threads(out.nbytes), *tags)
        return out

    def _heads(self, x: Tensor, heads: int, norm: Norm | None, rotary: Rotary | None, positions: Tensor) -> Tensor:
        x = x.unflatten(-1, (heads, -1))
        x = x if norm is None else self._norm(x, norm)
        if rotary is None:
            return x
        y, (rows, _, d) = torch.empty(x.shape), x.shape
        tables = address(rotary.cos), address(rotary.sin), rotary.cos.shape[1], rotary.interleaved
        source = address(x), 4 * x.stride(0), rows, heads, d
        kernels.turned(*source, *tables, positions.numpy(), address(y), threads(y.nbytes))
        return y

    def _one_sequence(self, step: Attend, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        first = torch.zeros_like(positions) if step.first is None else step.first[positions]
        end, lowest = int(positions.max()) + 1, int(first.min())
        keys, values = (cache[:, lowest:end].float() for cache in (keys, values))
        out = torch.empty(len(q), step.heads, step.dv)
        for rows in torch.arange(len(q)).split(QUERIES):
            block = slice(int(rows[0]), int(rows[-1]) + 1)
            seen = first[block], positions[block]
            start, stop = int(seen[0].min()), int(seen[1].max()) + 1
            for head in range(step.kv_heads):
                mine = slice(head * step.heads // step.kv_heads, (head + 1) * step.heads // step.kv_heads)
                k, v = (cache[head, start - lowest : stop - lowest] for cache in (keys, values))
                out[block, mine] = self._block(step, q[block, mine], k, v, start, seen, mine.start)
        return out.flatten(1)

    def _block(self, step: Attend, q: Tensor, k: Tensor, v: Tensor, start: int, seen: tuple, head: int) -> Tensor:
        """Queries (rows, heads, d) of one key head over keys (count, d), the first of which stands at `start`."""
        rows, heads, _ = q.shape
        scores = many(q.transpose(0, 1).flatten(0, 1), k)
        first, last = (t.numpy() for t in seen)
        alibi, sinks = (0 if t is None else address(t[head:]) for t in (step.alibi, step.sinks))
        sizes = heads, rows, len(k), start, first, last, step.scale, step.softcap or 0.0
        kernels.weights(address(scores), *sizes, alibi, sinks, threads(scores.nbytes))
        return many(scores, v.mT).unflatten(0, (heads, rows)).transpose(0, 1)
