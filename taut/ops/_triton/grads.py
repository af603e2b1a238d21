"""The element-wise parts of the gradients of a norm and of a gated unit; the heavy products are the vendor's."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.products import activate
from taut.ops._triton.start import interpreted, options


class Slopes(NamedTuple):
    """Programs a multiprocessor, rows that are on their way, and warps of the kernel of a norm's gradient."""

    programs: int = 4
    stages: int = 1
    warps: int = 8


def fitting(k: int) -> Slopes:
    """As many programs as the registers of a multiprocessor hold, which are those of 8192 features: each hides the
    waits of the others, and fetches its next rows while it works. Every program also writes a float32 row of sums, so
    that more would only cost."""
    block = triton.next_power_of_2(k)
    programs, warps = max(1, min(8, 8192 // block)), max(1, min(16, block // 256))
    return Slopes(programs, 3, warps) if block <= 8192 else Slopes(1, 2, 32)


@triton.jit
def norm_slopes(
    dy,
    x,
    gain,
    dx,
    partial,
    tokens,
    k,
    dy_stride,
    x_stride,
    eps,
    PARTS,
    BK: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """Rows g, g + PARTS, ... of dx, and their sum for the gain into row g of `partial`, float32 [PARTS, k]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    cols = tl.arange(0, BK)
    seen = cols < k
    scale = tl.load(gain + cols, mask=seen, other=0).to(tl.float32)
    sums = tl.zeros([BK], tl.float32)
    for row in tl.range(tl.program_id(0), tokens, PARTS, num_stages=STAGES):
        far = tl.cast(row, tl.int64)
        v = tl.load(x + far * x_stride + cols, mask=seen, other=0).to(tl.float32)
        d = tl.load(dy + far * dy_stride + cols, mask=seen, other=0).to(tl.float32)
        inv = tl.rsqrt(tl.sum(v * v, 0) / k + eps)
        v *= inv
        sums += d * v
        d *= scale
        slope = inv * (d - v * (tl.sum(d * v, 0) / k))
        tl.store(dx + far * k + cols, slope.to(dx.dtype.element_ty), mask=seen)
    tl.store(partial + tl.program_id(0).to(tl.int64) * k + cols, sums, mask=seen)


@triton.jit
def gain_slopes(partial, dgain, k, PARTS, BP: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    """The sum over all rows of `partial`, BN features a program and always in the same order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    sums = tl.zeros([BP, BN], tl.float32)
    for first in range(0, PARTS, BP):
        rows = first + tl.arange(0, BP)
        live = (rows < PARTS)[:, None] & (cols < k)[None, :]
        sums += tl.load(partial + rows.to(tl.int64)[:, None] * k + cols[None, :], mask=live, other=0)
    tl.store(dgain + cols, tl.sum(sums, 0).to(dgain.dtype.element_ty), mask=cols < k)


def rms_norm_grad(
    dy: Tensor, x: Tensor, gain: Tensor, dx: Tensor, eps: float, processors: int, config: Slopes | None = None
) -> tuple[Tensor, Tensor]:
    """Write the gradient to x [tokens, k] of rms_norm into a contiguous dx; return it and the gain's, of its dtype."""
    pdl, (tokens, k) = not interpreted(), x.shape
    config = config or fitting(k)
    # A row of sums is as much to move as one and a third of the rows of dx: with four of these a program it is a third.
    parts = min(tokens, max(processors, min(config.programs * processors, tokens // 4)))
    partial = torch.empty(parts, k, dtype=torch.float32, device=x.device)
    dgain = torch.empty(k, dtype=gain.dtype, device=x.device)
    sizes = tokens, k, dy.stride(0), x.stride(0), eps, parts
    norm_slopes[(parts,)](
        *(dy, x, gain, dx, partial, *sizes, triton.next_power_of_2(k), config.stages, pdl),
        **options(config.warps, pdl=pdl),
    )
    gain_slopes[(triton.cdiv(k, 32),)](partial, dgain, k, parts, 64, 32, pdl, **options(pdl=pdl))
    return dx, dgain


@triton.jit
def derivative(x, ACT: tl.constexpr):
    """The slope of `products.activate`."""
    if ACT == "silu":
        s = 1 / (1 + tl.exp(-x))
        y = s * (1 + x * (1 - s))
    elif ACT == "gelu":
        y = 0.5 * (1 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = 1 / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
        y = s + x * s * (1 - s) * 1.5957691216057308 * (1 + 0.134145 * x * x)
    elif ACT == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "relu2":
        y = tl.where(x > 0, 2 * x, 0.0)
    elif ACT == "sigmoid":
        s = 1 / (1 + tl.exp(-x))
        y = s * (1 - s)
    elif ACT == "tanh":
        t = 2 / (1 + tl.exp(-2 * x)) - 1
        y = 1 - t * t
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        y = x * 0 + 1
    return y


@triton.jit
def glu_slopes(dy, gate, up, dgate, dup, size, ACT: tl.constexpr, BN: tl.constexpr, PDL: tl.constexpr):
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    at = tl.program_id(0).to(tl.int64) * BN + tl.arange(0, BN)
    live = at < size
    d = tl.load(dy + at, mask=live, other=0).to(tl.float32)
    g = tl.load(gate + at, mask=live, other=0).to(tl.float32)
    u = tl.load(up + at, mask=live, other=0).to(tl.float32)
    tl.store(dgate + at, (d * u * derivative(g, ACT)).to(dgate.dtype.element_ty), mask=live)
    tl.store(dup + at, (d * activate(g, ACT)).to(dup.dtype.element_ty), mask=live)


def glu_grad(dy: Tensor, gate: Tensor, up: Tensor, dgate: Tensor, dup: Tensor, act: str) -> tuple[Tensor, Tensor]:
    """Write the gradients of act(gate) * up into dgate and dup and return them; all contiguous and of one shape."""
    pdl = not interpreted()
    glu_slopes[(triton.cdiv(dy.numel(), 1024),)](
        dy, gate, up, dgate, dup, dy.numel(), act, 1024, pdl, **options(pdl=pdl)
    )
    return dgate, dup
