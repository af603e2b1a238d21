"""From a row of q, k and v to what attention reads: the norm's division, rotary positions, and the new cache entries.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34; the division carried past the product: FlashNorm, 2024,
arXiv:2407.09577, section 2 (the cosines take the scalar); pages: PagedAttention, 2023, arXiv:2309.06180.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.start import interpreted, options


@triton.jit
def place_heads(
    qkv,
    squares,
    cos,
    sin,
    positions,
    sequences,
    table,
    q,
    keys,
    values,
    row_stride,
    table_stride,
    width,
    eps,
    page,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    HEADS: tl.constexpr,
    KV: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    ROTARY: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    BH: tl.constexpr,
    PDL: tl.constexpr,
):
    """BH heads of one token a program; see `rope_append`."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(0)
    head, feature = tl.program_id(1) * BH + tl.arange(0, BH), tl.arange(0, WIDTH)
    if INTERLEAVED:
        other = feature ^ 1
        sign = tl.where(feature % 2 == 0, -1.0, 1.0)
    else:
        other = tl.where(feature < ROTARY // 2, feature + ROTARY // 2, feature - ROTARY // 2)
        sign = tl.where(feature < ROTARY // 2, -1.0, 1.0)
    turned = feature < ROTARY
    live = (head < HEADS + 2 * KV)[:, None] & (feature < D)[None, :]
    spins = (head < HEADS + KV)[:, None] & turned[None, :]
    row = qkv + token.to(tl.int64) * row_stride + head[:, None] * D
    position = tl.load(positions + token).to(tl.int64)
    x = tl.load(row + feature[None, :], mask=live, other=0).to(tl.float32)
    y = tl.load(row + other[None, :], mask=live & spins, other=0).to(tl.float32) * sign[None, :]
    c = tl.load(cos + position * ROTARY + feature, mask=turned, other=1).to(tl.float32)[None, :]
    s = tl.load(sin + position * ROTARY + feature, mask=turned, other=0).to(tl.float32)[None, :]
    x = tl.where(spins, x * c + y * s, x)
    if squares is not None:
        x *= tl.rsqrt(tl.load(squares + token) / width + eps)
    block = token.to(tl.int64) if sequences is None else tl.load(sequences + token).to(tl.int64)
    inside = position
    if table is not None:
        block = tl.load(table + block * table_stride + position // page).to(tl.int64)
        inside = position % page
    out = x.to(q.dtype.element_ty)
    at = q + (token.to(tl.int64) * HEADS + head)[:, None] * D + feature[None, :]
    tl.store(at, out, mask=live & (head < HEADS)[:, None])
    key = head - HEADS
    at = keys + block * k_batch + inside * k_row + key[:, None] * k_head + feature[None, :]
    tl.store(at, out, mask=live & ((key >= 0) & (key < KV))[:, None])
    value = key - KV
    at = values + block * v_batch + inside * v_row + value[:, None] * v_head + feature[None, :]
    tl.store(at, out, mask=live & (value >= 0)[:, None])


def rope_append(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    *,
    sequences: Tensor | None = None,
    table: Tensor | None = None,
    squares: Tensor | None = None,
    width: int = 0,
    eps: float = 0.0,
    interleaved: bool = False,
) -> Tensor:
    """Write the turned queries into q and the turned keys and the values into their caches, in place; return q.

    qkv: [tokens, (heads + 2 kv_heads) d]; cos, sin: contiguous [all positions, rotary], each angle twice as in the op
    `rope`; positions: int [tokens]; q: contiguous [tokens, heads, d]; keys, values: [sequences, kv_heads, room, d], or
    with a `table` [sequences, pages] pages [pages, kv_heads, page, d]. Token t is of sequence t, or of sequences[t].
    With `squares`, float32 [tokens, 1], everything is also divided by sqrt(squares / width + eps): qkv is then the
    product of a raw stream `width` wide, whose sums of squares those are.
    """
    (tokens, heads, d), kv, pdl = q.shape, keys.shape[1], not interpreted()
    block = max(1, min(triton.next_power_of_2(heads + 2 * kv), 2048 // triton.next_power_of_2(d)))
    block = block if tokens > 64 else min(block, 4)
    place_heads[(tokens, triton.cdiv(heads + 2 * kv, block))](
        *(qkv, squares, cos, sin, positions, sequences, table, q, keys, values),
        *(qkv.stride(0), 0 if table is None else table.stride(0), width, eps, keys.shape[2]),
        *(*keys.stride()[:3], *values.stride()[:3], heads, kv, d, triton.next_power_of_2(d), cos.shape[1]),
        *(interleaved, block, pdl),
        **options(pdl=pdl),
    )
    return q
