"""A norm and the quantizer behind it in one pass over the rows: the normalised values are never stored."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.start import interpreted, options


@triton.jit
def mx_rows(x, scales, codes, tokens, d, x_stride, c, eps, EXACT: tl.constexpr, ROWS: tl.constexpr, BK: tl.constexpr,
            PDL: tl.constexpr):  # fmt: skip
    """ROWS rows a program: the greatest magnitude of every block of 32, from these the RMS (or the RMS itself), and
    from both the blocks' powers of two and the codes. E4M3 ends at 448, with an exponent of 8."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BK)
    live = (rows < tokens)[:, None] & (cols < d)[None, :]
    far = rows.to(tl.int64)[:, None]
    v = tl.load(x + far * x_stride + cols[None, :], mask=live, other=0).to(tl.float32)
    blocks = tl.reshape(v, [ROWS, BK // 32, 32])
    top = tl.max(tl.abs(blocks), 2)
    # A maximum leaves NaN out.
    top = tl.where(tl.max((blocks != blocks).to(tl.int32), 2) > 0, float("nan"), top)
    rms = tl.sqrt(tl.sum(v * v, 1) / d + eps) if EXACT else c * tl.sqrt(tl.sum(top * top, 1) / (d // 32) + eps)
    inverse = 1 / rms
    top *= inverse[:, None]
    field = (top.to(tl.int32, bitcast=True) >> 23) & 255
    finite = field < 255
    exponent = tl.maximum(field - 127 - 8, -127)
    # 2^-exponent in two factors, since the least is no normal number
    low = ((127 - exponent // 2) << 23).to(tl.float32, bitcast=True)
    high = ((127 - (exponent - exponent // 2)) << 23).to(tl.float32, bitcast=True)
    y = blocks * inverse[:, None, None] * low[:, :, None] * high[:, :, None]
    y = tl.where(finite[:, :, None], tl.minimum(tl.maximum(y, -448.0), 448.0), 0.0)
    bits = tl.reshape(y, [ROWS, BK]).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + far * d + cols[None, :], bits, mask=live)
    place = tl.arange(0, BK // 32)
    whole = (rows < tokens)[:, None] & (place < d // 32)[None, :]
    scale = tl.where(finite, exponent + 127, 255).to(tl.uint8)
    tl.store(scales + far * (d // 32) + place[None, :], scale, mask=whole)


@triton.jit
def fp8_rows(x, codes, scale, tokens, d, x_stride, eps, ROWS: tl.constexpr, BK: tl.constexpr, PDL: tl.constexpr):
    """ROWS rows a program: x over its greatest magnitude as codes, and the scale that also normalises them."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    rows, cols = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BK)
    live = (rows < tokens)[:, None] & (cols < d)[None, :]
    far = rows.to(tl.int64)[:, None]
    v = tl.load(x + far * x_stride + cols[None, :], mask=live, other=0).to(tl.float32)
    squares = tl.sum(v * v, 1)
    top = tl.maximum(tl.max(tl.abs(v), 1), 1e-30)
    y = v * (448.0 / top)[:, None]
    bits = tl.minimum(tl.maximum(y, -448.0), 448.0).to(tl.float8e4nv).to(tl.uint8, bitcast=True)
    tl.store(codes + far * d + cols[None, :], bits, mask=live)
    tl.store(scale + rows, top * tl.rsqrt(squares / d + eps) / 448.0, mask=rows < tokens)


def _tile(tokens: int, d: int) -> tuple[int, int, int]:
    """Rows a program, the width that holds one, and warps."""
    block = max(32, triton.next_power_of_2(d))
    rows = 1 << (max(1, min(4096 // block, tokens // 128)).bit_length() - 1)
    return rows, block, max(2, min(16, rows * block // 512))


def mx_norm(x: Tensor, c: float, eps: float, exact: bool) -> tuple[Tensor, Tensor]:
    """(scales uint8 [tokens, d / 32], codes uint8 [tokens, d]) of x [tokens, d]; see the op."""
    pdl, (tokens, d) = not interpreted(), x.shape
    scales = torch.empty(tokens, d // 32, dtype=torch.uint8, device=x.device)
    codes = torch.empty(tokens, d, dtype=torch.uint8, device=x.device)
    rows, block, warps = _tile(tokens, d)
    sizes = tokens, d, x.stride(0), c, eps
    mx_rows[(triton.cdiv(tokens, rows),)](x, scales, codes, *sizes, exact, rows, block, pdl, **options(warps, pdl=pdl))
    return scales, codes


def norm_fp8(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(codes uint8 [tokens, d], scale float32 [tokens]) of x [tokens, d]; see the op."""
    pdl, (tokens, d) = not interpreted(), x.shape
    codes = torch.empty(tokens, d, dtype=torch.uint8, device=x.device)
    scale = torch.empty(tokens, dtype=torch.float32, device=x.device)
    rows, block, warps = _tile(tokens, d)
    sizes = tokens, d, x.stride(0), eps
    fp8_rows[(triton.cdiv(tokens, rows),)](x, codes, scale, *sizes, rows, block, pdl, **options(warps, pdl=pdl))
    return codes, scale
