"""What stands around a product of many tokens, a row at a time: sums, norms, gates, and the greatest of a row.

A norm's division waits for a kernel that runs anyway: `add_rows` hands on the sum of squares of the stream it writes,
and `glu_rows` (as `heads.rope_append`) divides what the vendor's product made of the raw stream.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.products import activate
from taut.ops._triton.start import interpreted, options


@triton.jit
def stream_rows(
    x,
    delta,
    gain,
    total,
    y,
    squares,
    tokens,
    k,
    x_stride,
    delta_stride,
    eps,
    ROWS: tl.constexpr,
    BK: tl.constexpr,
    PDL: tl.constexpr,
):
    """ROWS rows a program, each of them at once: v = x (+ delta, rounded and written to `total`), the sum of squares
    of v, and rms_norm(v, gain, eps) into y, as far as they are asked for."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BK)
    live = (rows < tokens)[:, None] & (cols < k)[None, :]
    far = rows.to(tl.int64)[:, None]
    at = far * k + cols[None, :]
    v = tl.load(x + far * x_stride + cols[None, :], mask=live, other=0).to(tl.float32)
    if delta is not None:
        v += tl.load(delta + far * delta_stride + cols[None, :], mask=live, other=0).to(tl.float32)
        rounded = v.to(total.dtype.element_ty)
        tl.store(total + at, rounded, mask=live)
        v = rounded.to(tl.float32)
    sums = tl.sum(v * v, 1)
    if squares is not None:
        tl.store(squares + rows, sums, mask=rows < tokens)
    if y is not None:
        v *= tl.rsqrt(sums / k + eps)[:, None]
        if gain is not None:
            v *= tl.load(gain + cols, mask=cols < k, other=0).to(tl.float32)[None, :]
        tl.store(y + at, v.to(y.dtype.element_ty), mask=live)


@triton.jit
def gate_rows(
    x,
    squares,
    gate,
    up,
    y,
    n,
    k,
    x_stride,
    gate_stride,
    up_stride,
    eps,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """act(gate s) * (up s) of the unscaled products of one token, BN of them a program, with s = 1 / rms(x) of its row,
    from its sum of squares or from x."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    if squares is not None:
        total = tl.load(squares + row)
    else:
        sums = tl.zeros([BN], tl.float32)
        for start in range(0, k, BN):
            cols = start + tl.arange(0, BN)
            v = tl.load(x + row * x_stride + cols, mask=cols < k, other=0).to(tl.float32)
            sums += v * v
        total = tl.sum(sums, 0)
    inv = tl.rsqrt(total / k + eps)
    for start in range(tl.program_id(1) * BN, n, BN * tl.num_programs(1)):
        cols = start + tl.arange(0, BN)
        g = tl.load(gate + row * gate_stride + cols, mask=cols < n, other=0).to(tl.float32) * inv
        u = tl.load(up + row * up_stride + cols, mask=cols < n, other=0).to(tl.float32) * inv
        tl.store(y + row * n + cols, (activate(g, ACT) * u).to(y.dtype.element_ty), mask=cols < n)


@triton.jit
def greatest(x, y, n, stride, BN: tl.constexpr, PDL: tl.constexpr):
    """The place of the greatest element of a row, the first of equals; one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, lane = tl.program_id(0).to(tl.int64), tl.arange(0, BN)
    best = tl.full([BN], float("-inf"), tl.float32)
    place = lane
    for start in range(0, n, BN):
        cols = start + lane
        v = tl.load(x + row * stride + cols, mask=cols < n, other=float("-inf")).to(tl.float32)
        place = tl.where(v > best, cols, place)
        best = tl.maximum(v, best)
    top = tl.max(best, 0)
    tl.store(y + row, tl.min(tl.where(best == top, place, n), 0).to(tl.int64))


def stream(
    x: Tensor,
    delta: Tensor | None = None,
    gain: Tensor | None = None,
    total: Tensor | None = None,
    y: Tensor | None = None,
    squares: Tensor | None = None,
    eps: float = 0.0,
) -> None:
    """Write, as far as they are given: v = x + delta into `total`, the float32 sums of squares of v's rows into
    `squares`, and rms_norm(v, gain, eps) into y. x and delta: [tokens, k]; total and y: contiguous."""
    tokens, k = x.shape
    block = triton.next_power_of_2(k)
    # a norm alone of many tokens stands between two of the vendor's kernels, where an early start costs 0.4 us
    pdl = not interpreted() and (delta is not None or tokens <= 64)
    rows = 1 << (max(1, min(4096 // block, tokens // 128)).bit_length() - 1)
    sizes = tokens, k, x.stride(0), 0 if delta is None else delta.stride(0), eps
    warps = max(2, min(8, rows * block // 512))
    stream_rows[(triton.cdiv(tokens, rows),)](
        *(x, delta, gain, total, y, squares, *sizes, rows, block, pdl), **options(warps, pdl=pdl)
    )


def row_squares(y: Tensor) -> Tensor:
    """float32 [tokens, 1]: the sum of squares of each row of y [tokens, n]."""
    squares = torch.empty(len(y), 1, dtype=torch.float32, device=y.device)
    stream(y, squares=squares)
    return squares


def norm_rows(x: Tensor, gain: Tensor | None, y: Tensor, eps: float) -> Tensor:
    """Write rms_norm(x, gain, eps) of x [tokens, k] into a contiguous y and return it."""
    stream(x, gain=gain, y=y, eps=eps)
    return y


def add_norm_rows(x: Tensor, delta: Tensor, gain: Tensor | None, total: Tensor, y: Tensor, eps: float) -> Tensor:
    """Write x + delta [tokens, k] into `total` and rms_norm(total, gain, eps) into y, both contiguous; return y."""
    stream(x, delta, gain, total, y, eps=eps)
    return y


def add_rows(x: Tensor, delta: Tensor, total: Tensor) -> Tensor:
    """Write x + delta [tokens, k] into a contiguous `total`; its rows' sums of squares, float32 [tokens, 1]."""
    squares = torch.empty(len(x), 1, dtype=torch.float32, device=x.device)
    stream(x, delta, total=total, squares=squares)
    return squares


def glu_rows(
    x: Tensor, gate: Tensor, up: Tensor, y: Tensor, eps: float, act: str, squares: Tensor | None = None
) -> Tensor:
    """Write act(gate s) * (up s) with s = 1 / rms(x), a scalar a row, into a contiguous y [tokens, n] and return it.

    gate, up: [tokens, n], the products of the raw x; squares: float32 [tokens, 1], the sums of squares of x's rows, if
    they are known.
    """
    (tokens, k), n, pdl = x.shape, gate.shape[1], not interpreted()
    block = min(triton.next_power_of_2(n), 2048)
    parts = max(1, min(triton.cdiv(n, block), 264 // tokens))
    gate_rows[(tokens, parts)](
        *(x, squares, gate, up, y, n, k, x.stride(0), gate.stride(0), up.stride(0), eps, act, block, pdl),
        **options(pdl=pdl),
    )
    return y


def argmax_rows(x: Tensor) -> Tensor:
    """int64 [tokens]: where each row of x [tokens, n] is greatest, the first place of equals."""
    pdl = not interpreted()
    y = torch.empty(len(x), dtype=torch.int64, device=x.device)
    block = min(triton.next_power_of_2(x.shape[1]), 8192)
    greatest[(len(x),)](x, y, x.shape[1], x.stride(0), block, pdl, **options(8, pdl=pdl))
    return y
