"""Products of few tokens behind a LayerNorm whose mean and division are both deferred: each weight is read once.

    y = (x weight^T - mean(x) sums) / sqrt(variance(x) + eps) + bias + residual,    sums = the sum of each weight's row

One token is one kernel, `matvec`. More take two, and a third where the inputs are split: `statistics` goes over each
row once, where every program of the product would do it again, on cores slower than those that multiply. `products`
says the rest.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.launch import Config, even, source
from taut.ops._triton.products import FIRST_WAVE, given, prefetch, tile
from taut.ops._triton.start import interpreted, options

OF_FEW = Config(64, 16, 128, 1, 4, 4, 512)
"""For up to 16 tokens; for one and for more a product behind an RMSNorm is like it, and has a table (`choice`)."""


@triton.jit
def normed(dots, mean, inv, weighed, bias, residual):
    """What a tile of sums becomes; everything has its shape or broadcasts to it."""
    return (dots - mean * weighed) * inv + bias + residual


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
    """One token: BN outputs a program, BK inputs at a time. Without `sums` they are taken from the tiles.

    Everything is of x - c, with c the first feature, which changes nothing in real arithmetic and keeps the variance's
    digits where the mean is large.
    """
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    places = tl.where(live, rows, 0).to(tl.int64)
    if PDL:
        if EVEN and (ahead > 0) & (tl.program_id(0) < FIRST_WAVE):
            prefetch(weight, places * stride, 0, tl.minimum(k, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
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
        c = tl.load(x + tl.minimum(start, 0)).to(tl.float32)  # before the loop its first tiles would wait for it
        h = tl.where(seen, tl.load(x + cols, mask=seen, other=0).to(tl.float32) - c, 0)
        total += h
        squares += h * h
        dots += w * h[None, :]
        if sums is None:
            heavy += w
    weighed = given(sums, rows, live) if sums is not None else tl.sum(heavy, 1)
    added, kept = given(bias, rows, live), given(residual, rows, live)
    mean = tl.sum(total, 0) / k
    inv = tl.rsqrt(tl.maximum(tl.sum(squares, 0) / k - mean * mean, 0) + eps)
    out = normed(tl.sum(dots, 1), mean, inv, weighed, added, kept)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def statistics(x, found, tokens, k, stride, eps, BK: tl.constexpr, PDL: tl.constexpr):
    """The means of x's rows and behind them one over their deviations, float32 [2, tokens]; a row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token, cols = tl.program_id(0), tl.arange(0, BK)
    v = tl.load(x + token.to(tl.int64) * stride + cols, mask=cols < k, other=0).to(tl.float32)
    mean = tl.sum(v, 0) / k
    d = tl.where(cols < k, v - mean, 0)
    tl.store(found + token, mean)
    tl.store(found + tokens + token, tl.rsqrt(tl.sum(d * d, 0) / k + eps))


@triton.jit
def product(
    x,
    weight,
    weight_place,
    sums,
    found,
    bias,
    residual,
    y,
    partial,
    tokens,
    n,
    k,
    x_stride,
    stride,
    ahead,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """BT tokens times BN outputs a program, over one of SPLIT parts of the inputs; `found` is what `statistics` wrote.

    The tensor cores take x as it is, since x - mean would be rounded to 16 bits: the mean times `sums` comes off behind
    the product, whose float32 has digits enough for a mean that 16 bits hold beside a deviation. With SPLIT > 1 the
    sums go to `partial`, float32 [SPLIT, tokens, n].
    """
    row, token, part = tl.program_id(0) * BN, tl.program_id(1) * BT, tl.program_id(2)
    chunks = tl.cdiv(k, BK)
    first = chunks * part // SPLIT
    last = chunks * (part + 1) // SPLIT
    i, t = row + tl.arange(0, BN), token + tl.arange(0, BT)
    if PDL:
        if TMA and (ahead > 0) & (tl.program_id(0) * SPLIT + part < FIRST_WAVE):
            span = tl.minimum(tl.minimum(last * BK, k) - first * BK, ahead) * 2
            prefetch(weight_place, tl.minimum(i, n - 1).to(tl.int64) * stride, first * BK, span)
        gdc_launch_dependents()
        gdc_wait()
    mean, inv = given(found, t, t < tokens), given(found + tokens, t, t < tokens)
    weighed, added = given(sums, i, i < n), given(bias, i, i < n)
    dots = tl.zeros([BN, BT], tl.float32)
    for step in range(first, last):
        w = tile(weight, row, step * BK, n, k, stride, BN, BK, TMA)
        h = tile(x, token, step * BK, tokens, k, x_stride, BT, BK, TMA)
        dots = tl.dot(w, h.T, dots)
    at, live = t[None, :].to(tl.int64) * n + i[:, None], (i < n)[:, None] & (t < tokens)[None, :]
    if SPLIT > 1:
        tl.store(partial + part * tokens.to(tl.int64) * n + at, dots, mask=live)
    else:
        if bias is not None:
            added = added[:, None]
        out = normed(dots, mean[None, :], inv[None, :], weighed[:, None], added, given(residual, at, live))
        tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def finish(
    sums,
    found,
    partial,
    bias,
    residual,
    y,
    tokens,
    n,
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
    at = token.to(tl.int64) * n + rows
    dots = tl.zeros([BN], tl.float32)
    for part in tl.static_range(SPLIT):
        dots += tl.load(partial + part * tokens.to(tl.int64) * n + at, mask=live, other=0)
    mean, inv = tl.load(found + token), tl.load(found + tokens + token)
    weighed, added, kept = given(sums, rows, live), given(bias, rows, live), given(residual, at, live)
    out = normed(dots, mean, inv, weighed, added, kept)
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
    partial = torch.empty(split, tokens, n, dtype=torch.float32, device=x.device) if split > 1 else None
    sources = source(x, config.tokens, config, tma), source(weight, config.outputs, config, tma)
    found = _statistics(x, eps, pdl)
    product[(triton.cdiv(n, config.outputs), triton.cdiv(tokens, config.tokens), split)](
        *(*sources, weight, sums, found, bias, residual, y, partial, tokens, n, k, x.stride(0), weight.stride(0)),
        *(config.ahead, config.outputs, config.tokens, config.inputs, split, tma, pdl),
        **options(config.warps, config.stages, pdl),
    )
    if split > 1:
        finish[(triton.cdiv(n, 512), tokens)](
            *(sums, found, partial, bias, residual, y, tokens, n, split, 512, pdl), **options(pdl=pdl)
        )
    return y


def _statistics(x: Tensor, eps: float, pdl: bool) -> Tensor:
    """float32 [2, tokens]: the means of x's rows and one over their deviations."""
    tokens, k = x.shape
    found = torch.empty(2, tokens, dtype=torch.float32, device=x.device)
    block = triton.next_power_of_2(k)
    warps = max(1, min(32, block // 512))
    statistics[(tokens,)](x, found, tokens, k, x.stride(0), eps, block, pdl, **options(warps, pdl=pdl))
    return found
