"""A program run by torch, word by word: what the words mean, and how many rows at once are run.

Rows of one slot may stand behind each other, so a prompt is a program run of many rows: every row appends its key and
value before any row attends.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops._activation import activation
from taut.ops._weights import dequantize
from taut.ops.attention import attention
from taut.ops.rope import rope
from taut.runtime.gathers import views
from taut.runtime.steps import (
    Attend,
    Combine,
    Embed,
    Glu,
    Linear,
    Norm,
    Normalize,
    Program,
    Rotary,
    Step,
    Torch,
    View,
    Weight,
)

Caches = list[tuple[Tensor, Tensor]]


def empty_caches(program: Program, slots: int, dtype: torch.dtype) -> Caches:
    """Per cache layer keys (slots, kv_heads, max_length, d) and values."""
    return [
        tuple(torch.zeros(slots, heads, program.max_length, size, dtype=dtype) for size in (d, dv))  # type: ignore
        for heads, d, dv in program.caches
    ]


class PlainRunner:
    """Runs a program over caches; `dtype` float64 computes the real-number function."""

    def __init__(
        self, program: Program, max_batch: int, caches: Caches | None = None, dtype: torch.dtype = torch.float32
    ) -> None:
        self.program, self.dtype = program, dtype
        self.caches = empty_caches(program, max_batch, dtype) if caches is None else caches
        self.dead = _dead_after(program)
        self.mixing = max((i + 1 for i, step in enumerate(program.steps) if isinstance(step, Attend)), default=0)

    @torch.no_grad()
    def run(self, tokens: Tensor, positions: Tensor, slots: Tensor, rows: Tensor | None = None) -> Tensor:
        """Logits (rows, vocabulary) of every row, or of the rows named."""
        buffers: dict[str, Tensor] = {}
        places = tokens, positions, slots
        self._steps(range(self.mixing), buffers, *places)
        if rows is not None:  # behind the last attention no row looks at another
            buffers = {name: tensor[rows] for name, tensor in buffers.items()}
            places = tokens[rows], positions[rows], slots[rows]
        self._steps(range(self.mixing, len(self.program.steps)), buffers, *places)
        return buffers[self.program.logits]

    def _steps(self, which: range, buffers: dict[str, Tensor], *places: Tensor) -> None:
        for i in which:
            self._step(self.program.steps[i], buffers, *places)
            for name in self.dead[i]:
                del buffers[name]

    def _step(self, step: Step, buffers: dict[str, Tensor], tokens: Tensor, positions: Tensor, slots: Tensor) -> None:
        def view(v: View) -> Tensor:
            return buffers[v.buffer][:, v.start : v.stop]

        def or_none(v: View | None) -> Tensor | None:
            return None if v is None else view(v)

        match step:
            case Embed():
                buffers[step.out] = self._embed(step, tokens, positions)
            case Normalize():
                y = self._norm(view(step.x), step.norm)
                buffers[step.out] = y if step.residual is None else y + view(step.residual)
            case Linear():
                x = view(step.x) if step.norm is None else self._norm(view(step.x), step.norm)
                y = self._product(x, step.weight, step.bias)
                y = y if step.activation is None else activation(step.activation)(y)
                y = y if step.scale == 1 else y * step.scale
                y = y if step.softcap is None else step.softcap * torch.tanh(y / step.softcap)
                buffers[step.out] = y if step.residual is None else y.add_(view(step.residual))
            case Glu():
                x = view(step.x) if step.norm is None else self._norm(view(step.x), step.norm)
                buffers[step.out] = self._glu(step, x)
            case Attend():
                q, k, v = view(step.q), or_none(step.k), or_none(step.v)
                buffers[step.out] = self._attend(step, q, k, v, positions, slots)
            case Combine():
                a, b = view(step.a) * step.scale, or_none(step.b)
                buffers[step.out] = a if b is None else a * b if step.product else a + b * step.b_scale
            case Torch():
                outs = step.run(*(view(v) for v in step.inputs))
                buffers.update(zip(step.outs, outs, strict=True))

    def _wide(self, weight: Weight) -> Tensor:
        return dequantize(weight.data, weight.scale, self.dtype)

    def _embed(self, step: Embed, tokens: Tensor, positions: Tensor) -> Tensor:
        y = torch.zeros((), dtype=self.dtype, device=tokens.device)
        if step.table is not None:
            scale = None if step.table.scale is None else step.table.scale[tokens]
            y = dequantize(step.table.data[tokens], scale, self.dtype) * step.scale
        return y if step.positions is None else y + self._wide(step.positions)[positions + step.offset]

    def _norm(self, x: Tensor, norm: Norm) -> Tensor:
        x = x - x.mean(-1, keepdim=True) if norm.centred else x
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.eps)
        x = x if norm.gain is None else x.mul_(norm.gain.to(self.dtype))
        return x if norm.bias is None else x.add_(norm.bias.to(self.dtype))

    def _product(self, x: Tensor, weight: Weight, bias: Tensor | None) -> Tensor:
        return F.linear(x, self._wide(weight), None if bias is None else bias.to(self.dtype))

    def _glu(self, step: Glu, x: Tensor) -> Tensor:
        gate = activation(step.activation)(self._product(x, step.gate, step.gate_bias))
        return gate.mul_(self._product(x, step.up, step.up_bias))

    def _heads(self, x: Tensor, heads: int, norm: Norm | None, rotary: Rotary | None, positions: Tensor) -> Tensor:
        """(rows, heads, d), normed and turned."""
        x = x.unflatten(-1, (heads, -1))
        x = x if norm is None else self._norm(x, norm)
        if rotary is None:
            return x
        tables = (t.to(self.dtype)[positions] for t in (rotary.cos, rotary.sin))
        double = (lambda t: t.repeat_interleave(2, -1)) if rotary.interleaved else (lambda t: torch.cat((t, t), -1))
        cos, sin = (double(t)[:, None] for t in tables)
        return rope.reference(x, cos, sin, rotary.interleaved)

    def _attend(
        self, step: Attend, q: Tensor, k: Tensor | None, v: Tensor | None, positions: Tensor, slots: Tensor
    ) -> Tensor:
        keys, values = self.caches[step.layer]
        turned = self._heads(q, step.heads, step.q_norm, step.rotary, positions)
        if k is not None and v is not None:
            new = self._heads(k, step.kv_heads, step.k_norm, step.rotary, positions)
            keys[slots, :, positions] = new.to(keys.dtype)
            values[slots, :, positions] = v.unflatten(-1, (step.kv_heads, -1)).to(values.dtype)
        present = slots.unique().tolist()
        if len(present) == 1:
            return self._one_sequence(step, turned, keys[present[0]], values[present[0]], positions)
        out = q.new_empty(len(q), step.heads * step.dv)
        for slot in present:
            rows = (slots == slot).nonzero()[:, 0]
            out[rows] = self._one_sequence(step, turned[rows], keys[slot], values[slot], positions[rows])
        return out

    def _one_sequence(self, step: Attend, q: Tensor, keys: Tensor, values: Tensor, positions: Tensor) -> Tensor:
        """Queries (rows, heads, d) over one sequence's keys (kv_heads, max_length, d)."""
        end = int(positions.max()) + 1
        q = q.transpose(0, 1)[None]
        past = [t[None, :, :end].to(self.dtype) for t in (keys, values)]
        sinks = None if step.sinks is None else step.sinks.to(self.dtype)
        key = torch.arange(end, device=q.device)
        in_a_row = torch.equal(positions, key[end - len(positions) :])
        if in_a_row and step.first is None and step.alibi is None:
            y = attention(q, *past, None, step.scale, True, step.softcap, None, sinks)
            return y[0].transpose(0, 1).flatten(1)
        first = torch.zeros_like(positions) if step.first is None else step.first[positions]
        mask = (key <= positions[:, None]) & (key >= first[:, None])
        if step.alibi is not None:
            ago = (positions[:, None] - key).to(self.dtype)
            mask = torch.where(mask, -step.alibi.to(self.dtype)[:, None, None] * ago, float("-inf"))[None]
        y = attention(q, *past, mask, step.scale, False, step.softcap, None, sinks)
        return y[0].transpose(0, 1).flatten(1)


def _dead_after(program: Program) -> list[list[str]]:
    """For every step the buffers that nothing reads after it."""
    last: dict[str, int] = {}
    for i, step in enumerate(program.steps):
        outs = step.outs if isinstance(step, Torch) else (step.out,)
        last |= dict.fromkeys([*outs, *(view.buffer for view in views(step))], i)
    last.pop(program.logits)
    return [[name for name, at in last.items() if at == i] for i in range(len(program.steps))]
