"""How the words of a program call their kernels: the tensors of one step, of as many rows as they have."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from taut.ops._triton.launch import Config, even, source
from taut.runtime._triton import attend as attending
from taut.runtime._triton import dense, place
from taut.runtime._triton import stretches as stretching
from taut.runtime.steps import Attend, Norm

FULL, RMS, PLAIN = (kind.value for kind in (dense.FULL, dense.RMS, dense.PLAIN))


class After(NamedTuple):
    """What follows a product: biases of it and of the gate's partner, activation, scale, cap, and what is added."""

    bias: Tensor | None = None
    up_bias: Tensor | None = None
    activation: str = "identity"
    scale: float = 1.0
    cap: float | None = None
    residual: Tensor | None = None


class Reach(NamedTuple):
    """Keys a tile, most stretches of a sequence, least keys of one where attention joins them itself, warps."""

    keys: int = 64
    splits: int = 16
    least: int = 64
    warps: int = 4


class Stretches(NamedTuple):
    """Attention of one row, not joined yet: float32 [count, heads, dv], and their sums' logarithms [count, heads]."""

    found: Tensor
    logs: Tensor
    dv: int
    count: int


def options(config: Config, pdl: bool) -> dict[str, int | bool]:
    return {"num_warps": config.warps, "num_stages": config.stages} | ({"launch_pdl": True} if pdl else {})


def one(
    x: Tensor, weight: Tensor, up: Tensor | None, y: Tensor, norm: Norm | None, after: After, config: Config, pdl: bool,
    stretches: Stretches | None = None,
) -> None:  # fmt: skip
    """y = what follows the product of norm(x), a row [k], with weight [n, k]; with `up`, gated by it. With
    `stretches` x is not read, but joined from them. A row held at once is one tile, padded, or with a `split` two: the
    largest power of two, and the rest."""
    n, k = weight.shape
    kind, gain, shift, centred = _norm(norm)
    whole = k <= config.inputs
    size = max(16, 1 << (k.bit_length() - 1) if config.split > 1 else triton.next_power_of_2(k))
    tail = triton.next_power_of_2(max(k - size, 16)) if whole and k > size else 0
    row = (x, None, 1, 0) if stretches is None else (*stretches[:2], stretches.dv, stretches.count)
    dense.one[(triton.cdiv(n, config.outputs),)](
        *(*row[:2], weight, up, gain, shift, after.bias, after.up_bias, after.residual, y, n, k, weight.stride(0)),
        *(0 if up is None else up.stride(0), norm.eps if norm else 0.0, after.scale, after.cap or 1.0),
        *(config.ahead if even(weight) and (up is None or even(up)) else 0, kind, centred, after.activation),
        *(after.cap is not None, *row[2:], config.outputs, size if whole else config.inputs, tail, whole, pdl),
        **options(config, pdl),
    )


def many(
    x: Tensor, weight: Tensor, up: Tensor | None, y: Tensor, norm: Norm | None, after: After, config: Config, pdl: bool
) -> None:
    """The same of rows: x [rows, k], y [rows, n]; the norm has neither gain nor shift and is not centred."""
    (rows, k), n = x.shape, len(weight)
    tma = all(even(t) for t in (x, weight, up) if t is not None) and x.dtype == weight.dtype
    split, parts = min(config.split, triton.cdiv(k, config.inputs)), 1 if up is None else 2
    room = (parts * n + 1) * rows * split if split > 1 else 0
    partial = torch.empty(room, dtype=torch.float32, device=x.device) if room else None
    residual, kind = after.residual, RMS if norm else PLAIN
    strides = 0 if residual is None else residual.stride(0), y.stride(0)
    numbers = norm.eps if norm else 0.0, after.scale, after.cap or 1.0
    dense.many[(triton.cdiv(n, config.outputs), triton.cdiv(rows, config.tokens), split)](
        *(source(x, config.tokens, config, tma), source(weight, config.outputs, config, tma)),
        None if up is None else source(up, config.outputs, config, tma),
        *(after.bias, after.up_bias, residual, y, partial),
        *(weight, up, rows, n, k, x.stride(0), weight.stride(0), 0 if up is None else up.stride(0), *strides),
        *(*numbers, config.ahead, kind, after.activation, after.cap is not None),
        *(config.outputs, config.tokens, config.inputs, split, tma, pdl),
        **options(config, pdl),
    )
    if split > 1:
        dense.join[(triton.cdiv(n, 512), rows)](
            *(partial, after.bias, after.up_bias, residual, y, rows, n, k, *strides, *numbers),
            *(kind, after.activation, after.cap is not None, up is not None, split, 512, pdl),
            **options(Config(0, 0, 0), pdl),
        )


def attend(
    step: Attend,
    rows: tuple[Tensor, Tensor | None, Tensor | None, Tensor],
    caches: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    scratch: tuple[Tensor, Tensor],
    reach: Reach,
    pdl: bool,
) -> None:
    """`rows` are q, k, v and out [rows, features]; `scratch` the room for stretches, and the counters, zeros."""
    (q, k, v, y), (keys, values) = rows, caches
    norms, numbers, kinds = _of_heads(step)
    group, up = step.heads // step.kv_heads, triton.next_power_of_2
    stride = lambda t: 0 if t is None else t.stride(0)  # noqa: E731
    attending.attend[(len(y), step.kv_heads, reach.splits)](
        *(q, k, v, keys, values, positions, slots, *norms, step.first, step.alibi, step.sinks, *scratch, y),
        *(stride(q), stride(k), stride(v), stride(y), *keys.stride()[:2], *values.stride()[:2], *numbers),
        *(reach.least, group, up(max(group, 16)), step.d, up(max(step.d, 16)), step.dv, up(max(step.dv, 16))),
        *(*kinds, reach.keys, reach.splits, min(8, up(reach.splits)), up(group), pdl),
        **options(Config(0, 0, 0, warps=reach.warps), pdl),
    )


def stretch(
    step: Attend,
    row: tuple[Tensor, Tensor | None, Tensor | None],
    caches: tuple[Tensor, Tensor],
    positions: Tensor,
    slots: Tensor,
    left: Stretches,
    reach: Reach,
    pdl: bool,
) -> None:
    """The attention of one row into `left`, not joined; `row` is q, k and v [1, features]."""
    (keys, values), up = caches, triton.next_power_of_2
    norms, numbers, kinds = _of_heads(step)
    stretching.stretch[(step.heads, left.count)](
        *(*row, keys, values, positions, slots, *norms, step.first, step.alibi, left.found, left.logs),
        *(*keys.stride()[:2], *values.stride()[:2], *numbers, step.heads // step.kv_heads),
        *(step.d, up(max(step.d, 16)), step.dv, up(max(step.dv, 16)), *kinds, reach.keys, pdl),
        **options(Config(0, 0, 0, warps=reach.warps), pdl),
    )


def _of_heads(step: Attend) -> tuple[tuple, tuple, tuple]:
    """What an attention does to its heads and scores: tables, numbers, and what the kernel is made for."""
    rotary = step.rotary
    (q_kind, *q_norm, q_centred), (k_kind, *k_norm, k_centred) = _norm(step.q_norm), _norm(step.k_norm)
    tables = (None, None) if rotary is None else (rotary.cos, rotary.sin)
    epsilons = (norm.eps if norm else 0.0 for norm in (step.q_norm, step.k_norm))
    half, interleaved = (0, False) if rotary is None else (rotary.cos.shape[1], rotary.interleaved)
    kinds = half, interleaved, q_kind != PLAIN, q_centred, k_kind != PLAIN, k_centred, step.softcap is not None
    return (*tables, *q_norm, *k_norm), (step.scale, step.softcap or 1.0, *epsilons), kinds


def embed(
    table: Tensor | None, learned: Tensor | None, tokens: Tensor, positions: Tensor, y: Tensor, offset: int,
    scale: float, pdl: bool,
) -> None:  # fmt: skip
    rows, n = y.shape
    strides = (0 if table is None else table.stride(0)), (0 if learned is None else learned.stride(0)), y.stride(0)
    place.embed[(triton.cdiv(n, 1024), rows)](
        *(table, learned, tokens, positions, y, n, *strides, offset, scale, 1024, pdl), **options(Config(0, 0, 0), pdl)
    )


def normalize(x: Tensor, norm: Norm, residual: Tensor | None, y: Tensor, pdl: bool) -> None:
    rows, k = x.shape
    _, gain, shift, centred = _norm(norm)
    block = min(4096, triton.next_power_of_2(k))
    place.normalize[(rows,)](
        *(x, gain, shift, residual, y, k, x.stride(0), 0 if residual is None else residual.stride(0), y.stride(0)),
        *(norm.eps, centred, block, pdl),
        **options(Config(0, 0, 0), pdl),
    )


def combine(a: Tensor, b: Tensor | None, y: Tensor, scale: float, b_scale: float, product: bool, pdl: bool) -> None:
    rows, n = y.shape
    place.combine[(triton.cdiv(n, 1024), rows)](
        *(a, b, y, n, a.stride(0), 0 if b is None else b.stride(0), y.stride(0), scale, b_scale, product, 1024, pdl),
        **options(Config(0, 0, 0), pdl),
    )


STRETCHES = 64
"""Into so many parts `draw` splits a row of logits."""


def draw(
    logits: Tensor, best: Tensor, places: Tensor, counters: Tensor, tokens: Tensor, positions: Tensor, slots: Tensor,
    seed: Tensor | None, heat: Tensor, pdl: bool,
) -> None:  # fmt: skip
    """The first of the greatest logits of each row into `tokens`, and every position one on; with a `seed` int64 on
    the device, of logits / heat with noise. `best` is float32 and `places` int32 [rows, STRETCHES]; `counters` int32
    [rows], zeros."""
    rows, n = logits.shape
    tables = logits, best, places, counters, tokens, positions, slots, seed, heat
    sizes = n, logits.stride(0), STRETCHES, 1024, pdl
    place.draw[(STRETCHES, rows)](*tables, *sizes, **options(Config(0, 0, 0), pdl))


def _norm(norm: Norm | None) -> tuple[int, Tensor | None, Tensor | None, bool]:
    """(kind, gain, shift, centred)"""
    if norm is None:
        return PLAIN, None, None, False
    return FULL if norm.centred or norm.bias is not None else RMS, norm.gain, norm.bias, norm.centred
