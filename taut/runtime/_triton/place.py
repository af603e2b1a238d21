"""What is no product: tokens embedded, rows normed and combined, the likeliest token found, and the rows moved on."""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.sampling import gumbel, words
from taut.runtime._triton.dense import statistics


@triton.jit
def embed(
    table, learned, tokens, positions, y, n, stride, learned_stride, y_stride, offset, scale, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (columns / BN, rows): table[token] * scale + learned[position + offset], either of which may be missing."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    out = tl.zeros([BN], tl.float32)
    if table is not None:
        token = tl.load(tokens + row)
        out += tl.load(table + token * stride + cols, mask=cols < n, other=0).to(tl.float32) * scale
    if learned is not None:
        place = tl.load(positions + row) + offset
        out += tl.load(learned + place * learned_stride + cols, mask=cols < n, other=0).to(tl.float32)
    tl.store(y + row * y_stride + cols, out.to(y.dtype.element_ty), mask=cols < n)


@triton.jit
def normalize(
    x, gain, shift, residual, y, k, x_stride, residual_stride, y_stride, eps, CENTRED: tl.constexpr, BK: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """A row a program: norm(x) + residual."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0).to(tl.int64)
    mean, inv = statistics(x + row * x_stride, k, eps, CENTRED, BK)
    for start in range(0, k, BK):
        cols = start + tl.arange(0, BK)
        seen = cols < k
        out = (tl.load(x + row * x_stride + cols, mask=seen, other=0).to(tl.float32) - mean) * inv
        if gain is not None:
            out *= tl.load(gain + cols, mask=seen, other=0)
        if shift is not None:
            out += tl.load(shift + cols, mask=seen, other=0)
        if residual is not None:
            out += tl.load(residual + row * residual_stride + cols, mask=seen, other=0).to(tl.float32)
        tl.store(y + row * y_stride + cols, out.to(y.dtype.element_ty), mask=seen)


@triton.jit
def combine(
    a, b, y, n, a_stride, b_stride, y_stride, scale, b_scale, PRODUCT: tl.constexpr, BN: tl.constexpr,
    PDL: tl.constexpr,
):  # fmt: skip
    """Grid (columns / BN, rows): a * scale + b * b_scale, a * scale * b, or a * scale."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(1).to(tl.int64)
    cols = tl.program_id(0) * BN + tl.arange(0, BN)
    out = tl.load(a + row * a_stride + cols, mask=cols < n, other=0).to(tl.float32) * scale
    if b is not None:
        other = tl.load(b + row * b_stride + cols, mask=cols < n, other=0).to(tl.float32)
        out = out * other if PRODUCT else out + other * b_scale
    tl.store(y + row * y_stride + cols, out.to(y.dtype.element_ty), mask=cols < n)


@triton.jit
def draw(
    logits, best, places, counters, tokens, positions, slots, seed, heat, n, stride, PARTS: tl.constexpr,
    BN: tl.constexpr, PDL: tl.constexpr,
):  # fmt: skip
    """Grid (PARTS, rows): the greatest logit of a stretch; whoever finishes last puts the first of the greatest of all
    into `tokens` and moves the row on by a position. With a `seed`, of logits / heat with noise of seed + slot.

    `best` float32 and `places` int32 are [rows, PARTS], `counters` int32 [rows], zeros before and after.
    """
    part, row = tl.program_id(0), tl.program_id(1)
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    first = tl.cdiv(n, PARTS * BN) * BN * part
    last = tl.minimum(tl.cdiv(n, PARTS * BN) * BN * (part + 1), n)
    greatest = tl.full([BN], float("-inf"), tl.float32)
    where = tl.zeros([BN], tl.int32) + tl.minimum(first, n - 1)
    for start in range(first, last, BN):
        cols = start + tl.arange(0, BN)
        value = tl.load(logits + row.to(tl.int64) * stride + cols, mask=cols < last, other=float("-inf"))
        if seed is not None:
            key, step = tl.load(seed) + tl.load(slots + row), tl.load(positions + row).to(tl.int32) + 1
            noise = gumbel(words(key, step, start, tl.zeros([1], tl.int32), BN // 4, 1))
            value = value / tl.load(heat) + tl.reshape(noise, (BN,))
        where = tl.where(value > greatest, cols, where)
        greatest = tl.maximum(value, greatest)
    top = tl.max(greatest, 0)
    tl.store(best + row * PARTS + part, top)
    tl.store(places + row * PARTS + part, tl.min(tl.where(greatest == top, where, n - 1), 0))
    tl.debug_barrier()
    if tl.atomic_add(counters + row, 1, sem="acq_rel") == PARTS - 1:
        tl.store(counters + row, 0)
        at = row * PARTS + tl.arange(0, PARTS)
        value = tl.load(best + at, cache_modifier=".cg")
        place = tl.load(places + at, cache_modifier=".cg")
        place = tl.min(tl.where(value == tl.max(value, 0), place, n - 1), 0)
        tl.store(tokens + row, place.to(tl.int64))
        tl.store(positions + row, tl.load(positions + row) + 1)
