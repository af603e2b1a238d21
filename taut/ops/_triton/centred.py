"""Products of few tokens behind a LayerNorm whose mean and division are both deferred: each weight is read once.

    y = ((x - c) weight^T - mean(x - c) sums) / sqrt(variance + eps) + bias + residual

with `sums` the sum of each row of the weight, and c a number of each token's own, its first feature, which changes
nothing in real arithmetic and keeps the variance's digits where the mean is large. `products` says the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.launch import Config, even, source
from taut.ops._triton.products import FIRST_WAVE, prefetch, tile
from taut.ops._triton.start import interpreted, options


@triton.jit
def normed(dots, total, squares, sums, bias, residual, tokens, rows, live, n, k, eps):
    """What a tile of sums becomes; `total` and `squares` are of x - c, and all have the tile's shape or broadcast."""
    mean = total / k
    inv = tl.rsqrt(tl.maximum(squares / k - mean * mean, 0) + eps)
    out = (dots - mean * sums) * inv
    if bias is not None:
        out += tl.load(bias + rows, mask=live, other=0).to(tl.float32)
    if residual is not None:
        out += tl.load(residual + tokens.to(tl.int64) * n + rows, mask=live, other=0).to(tl.float32)
    return out


@triton.jit
def matvec(
    x,
    weight,
    sums,
    bias,
    residual,
    y,
    n,
    k,
    stride,
    eps,
    ahead,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: BN outputs a program, BK inputs at a time. Without `sums` they are taken from the tiles."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    places = tl.where(live, rows, 0).to(tl.int64)
    if PDL:
        if EVEN and (ahead > 0) & (tl.program_id(0) < FIRST_WAVE):
            prefetch(weight, places * stride, 0, tl.minimum(k, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
    c = tl.load(x).to(tl.float32)
    dots = tl.zeros([BN, BK], tl.float32)
    heavy = tl.zeros([BN, BK], tl.float32)
    total = tl.zeros([BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        cols = start + tl.arange(0, BK)
        seen = cols < k
        at = places[:, None] * stride + cols[None, :]
        w = tl.load(weight + at, mask=live[:, None] & seen[None, :], other=0, eviction_policy="evict_first")
        w = w.to(tl.float32)
        h = tl.where(seen, tl.load(x + cols, mask=seen, other=0).to(tl.float32) - c, 0)
        total += h
        squares += h * h
        dots += w * h[None, :]
        if sums is None:
            heavy += w
    weighed = tl.load(sums + rows, mask=live, other=0) if sums is not None else tl.sum(heavy, 1)
    statistics = tl.sum(total, 0), tl.sum(squares, 0)
    out = normed(tl.sum(dots, 1), *statistics, weighed, bias, residual, rows * 0, rows, live, n, k, eps)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def product(
    x,
    weight,
    x_place,
    weight_place,
    sums,
    bias,
    residual,
    y,
    partial,
    tokens,
    n,
    k,
    x_stride,
    stride,
    eps,
    ahead,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """BT tokens times BN outputs a program, over one of SPLIT parts of the inputs.

    The tensor cores take x as it is, since x - c would be rounded to 16 bits: c times `sums` comes off behind the
    product, whose float32 has digits enough for a mean that 16 bits hold beside a deviation. With SPLIT > 1 the sums go
    to `partial`, float32 [SPLIT, tokens, n] and behind it [SPLIT, 2, tokens].
    """
    row, token, part = tl.program_id(0) * BN, tl.program_id(1) * BT, tl.program_id(2)
    chunks = tl.cdiv(k, BK)
    first = chunks * part // SPLIT
    last = chunks * (part + 1) // SPLIT
    if PDL:
        if TMA and (ahead > 0) & (tl.program_id(0) * SPLIT + part < FIRST_WAVE):
            i = tl.minimum(row + tl.arange(0, BN), n - 1).to(tl.int64)
            prefetch(weight_place, i * stride, first * BK, tl.minimum(tl.minimum(last * BK, k) - first * BK, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
    i, t = row + tl.arange(0, BN), token + tl.arange(0, BT)
    c = tl.load(x_place + t.to(tl.int64) * x_stride, mask=t < tokens, other=0).to(tl.float32)
    dots = tl.zeros([BN, BT], tl.float32)
    total = tl.zeros([BT], tl.float32)
    squares = tl.zeros([BT], tl.float32)
    for step in range(first, last):
        w = tile(weight, row, step * BK, n, k, stride, BN, BK, TMA)
        h = tile(x, token, step * BK, tokens, k, x_stride, BT, BK, TMA)
        dots = tl.dot(w, h.T, dots)
        seen = (step * BK + tl.arange(0, BK) < k)[None, :]
        d = tl.where(seen, h.to(tl.float32) - c[:, None], 0)
        total += tl.sum(d, 1)
        squares += tl.sum(d * d, 1)
    at, live = t[None, :].to(tl.int64) * n + i[:, None], (i < n)[:, None] & (t < tokens)[None, :]
    if SPLIT > 1:
        size = tokens.to(tl.int64) * n
        tl.store(partial + part * size + at, dots, mask=live)
        if row == 0:
            places = partial + SPLIT * size + part * 2 * tokens + t
            tl.store(places, total, mask=t < tokens)
            tl.store(places + tokens, squares, mask=t < tokens)
    else:
        weighed = tl.load(sums + i, mask=i < n, other=0)
        rows, of = i[:, None] + tl.zeros([BN, BT], tl.int32), t[None, :] + tl.zeros([BN, BT], tl.int32)
        dots -= c[None, :] * weighed[:, None]
        out = normed(
            dots, total[None, :], squares[None, :], weighed[:, None], bias, residual, of, rows, live, n, k, eps
        )
        tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def finish(
    x,
    sums,
    partial,
    bias,
    residual,
    y,
    tokens,
    n,
    k,
    x_stride,
    eps,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the partials of `product` in their order and finish them: BN outputs of one token a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    size = tokens.to(tl.int64) * n
    at = token.to(tl.int64) * n + rows
    dots = tl.zeros([BN], tl.float32)
    total = 0.0
    squares = 0.0
    for part in tl.static_range(SPLIT):
        dots += tl.load(partial + part * size + at, mask=live, other=0)
        places = partial + SPLIT * size + part * 2 * tokens + token
        total += tl.load(places)
        squares += tl.load(places + tokens)
    weighed = tl.load(sums + rows, mask=live, other=0)
    dots -= tl.load(x + token.to(tl.int64) * x_stride).to(tl.float32) * weighed
    out = normed(dots, total, squares, weighed, bias, residual, rows * 0 + token, rows, live, n, k, eps)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


def project(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    config: Config,
    *,
    sums: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float = 1e-5,
) -> Tensor:
    """Write layer_norm(x, eps) weight^T + bias + residual into y and return it.

    x: [tokens, k]; weight: [n, k]; sums: float32 [n], the weight's rows summed; y and residual: contiguous [tokens, n];
    all of one 16-bit dtype but sums and y.
    """
    (tokens, k), n, pdl = x.shape, len(weight), config.ahead >= 0 and not interpreted()
    if config.tokens == 0:
        sizes = n, k, weight.stride(0), eps, config.ahead, config.outputs, config.inputs
        matvec[(triton.cdiv(n, config.outputs),)](
            *(x, weight, sums, bias, residual, y, *sizes, even(weight), config.stages, pdl),
            **options(config.warps, config.stages, pdl),
        )
        return y
    sums = weight.sum(1, dtype=torch.float32) if sums is None else sums
    tma, split = even(x) and even(weight), min(config.split, triton.cdiv(k, config.inputs))
    room = (n + 2) * tokens * split if split > 1 else 0
    partial = torch.empty(room, dtype=torch.float32, device=x.device) if room else None
    sources = source(x, config.tokens, config, tma), source(weight, config.outputs, config, tma)
    product[(triton.cdiv(n, config.outputs), triton.cdiv(tokens, config.tokens), split)](
        *(*sources, x, weight, sums, bias, residual, y, partial, tokens, n, k, x.stride(0), weight.stride(0), eps),
        *(config.ahead, config.outputs, config.tokens, config.inputs, split, tma, pdl),
        **options(config.warps, config.stages, pdl),
    )
    if split > 1:
        finish[(triton.cdiv(n, 512), tokens)](
            *(x, sums, partial, bias, residual, y, tokens, n, k, x.stride(0), eps, split, 512, pdl), **options(pdl=pdl)
        )
    return y
