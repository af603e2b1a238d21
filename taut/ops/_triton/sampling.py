"""Sampling from a language model's head without its logits: a draw a tile of the vocabulary, then the best of them.

Source: Ruiz et al., FlashSampling, 2026, arXiv:2603.15854. Differs: as `taut.nn.sampling`, whose draws these are: the
noise is -log(-log1p(-v)), here in float32 from the random bits on either side of one half, so that both tails keep
their resolution; and the final norm's scalar enters as a temperature a row.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.products import FIRST_WAVE, prefetch, tile


@triton.jit
def gumbel(bits):
    """Standard Gumbel noise from 32 random bits, with v = (bits + 1/2) / 2^32 and 1 - v both exact where small."""
    v = (bits.to(tl.float32) + 0.5) * 2.3283064365386963e-10
    rest = ((bits ^ 0xFFFFFFFF).to(tl.uint32).to(tl.float32) + 0.5) * 2.3283064365386963e-10
    near = 1 - v
    small = tl.where(near == 1, v, tl.log(tl.where(near <= 0, 0.5, near)) * v / tl.where(near == 1, 1.0, near - 1))
    return -tl.log(tl.where(v < 0.5, small, -tl.log(rest)))


@triton.jit
def words(seed, step, first, rows, QUADS: tl.constexpr, BT: tl.constexpr):
    """Random words [4 QUADS, BT] for the tokens from `first`, a multiple of 4, on."""
    quad = (first // 4 + tl.arange(0, QUADS))[:, None] + tl.zeros([QUADS, BT], tl.int32)
    row = rows[None, :] + tl.zeros([QUADS, BT], tl.int32)
    high = tl.zeros([QUADS, BT], tl.int32) + step
    w0, w1, w2, w3 = tl.philox(seed, quad, row, high, tl.zeros([QUADS, BT], tl.int32))
    pairs = tl.join(tl.join(w0, w2), tl.join(w1, w3))
    return tl.reshape(tl.permute(pairs, (0, 2, 3, 1)), (4 * QUADS, BT))


@triton.jit
def draw_tiles(
    x,
    weight,
    weight_place,
    temperature,
    mask,
    key,
    noisy,
    ids,
    tops,
    sums,
    batch,
    vocabulary,
    k,
    mask_stride,
    x_stride,
    stride,
    eps,
    ahead,
    NORM: tl.constexpr,
    KEEP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """For BT rows and BN tokens a program: the greatest noisy logit with its id, the greatest logit, and the sum of
    exp(logit - that), each [tiles, batch]. `key` holds the seed and the step; temperature 0 adds no noise. Without a
    `temperature` only the greatest logit and its id. With KEEP, a power of two, only the KEEP greatest logits with
    their ids, packed into `ids` [batch, tiles, KEEP], the greatest first."""
    first, row = tl.program_id(0) * BN, tl.program_id(1) * BT
    if PDL:
        if TMA and (ahead > 0) & (tl.program_id(0) < FIRST_WAVE):
            place = tl.minimum(first + tl.arange(0, BN), vocabulary - 1).to(tl.int64)
            prefetch(weight_place, place * stride, 0, tl.minimum(k, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
    dots = tl.zeros([BN, BT], tl.float32)
    gram = tl.zeros([BT, BT], tl.float32)
    for start in range(0, k, BK):
        w = tile(weight, first, start, vocabulary, k, stride, BN, BK, TMA)
        h = tile(x, row, start, batch, k, x_stride, BT, BK, TMA)
        dots = tl.dot(w, h.T, dots)
        if NORM:
            gram = tl.dot(h, h.T, gram)
    rows, tokens = row + tl.arange(0, BT), first + tl.arange(0, BN)
    if temperature is not None:
        heat = tl.load(temperature + rows, mask=rows < batch, other=0)
        factor = 1 / tl.where(heat > 0, heat, 1.0)
    else:
        factor = tl.full([BT], 1.0, tl.float32)
    if NORM:
        diagonal = tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :]
        factor *= tl.rsqrt(tl.sum(tl.where(diagonal, gram, 0.0), 0) / k + eps)
    logits = dots * factor[None, :]
    allowed = (tokens < vocabulary)[:, None] & (rows < batch)[None, :]
    if mask is not None:
        at = rows[None, :].to(tl.int64) * mask_stride + tokens[:, None]
        allowed = allowed & (tl.load(mask + at, mask=allowed, other=0) != 0)
    logits = tl.where(allowed, logits, float("-inf"))
    if KEEP > 0:
        kept = tl.topk(tl.trans(packed(logits, tokens[:, None])), KEEP)
        at = (rows.to(tl.int64) * tl.num_programs(0) + tl.program_id(0)) * KEEP
        tl.store(ids + at[:, None] + tl.arange(0, KEEP)[None, :], kept, mask=(rows < batch)[:, None])
    else:
        value = logits
        if temperature is not None:
            noise = gumbel(words(tl.load(key), tl.load(key + 1).to(tl.int32), first, rows, BN // 4, BT))
            value = tl.where(allowed, logits + tl.where((heat > 0)[None, :], noise, 0.0), float("-inf"))
        best, at = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
        out = tl.program_id(0).to(tl.int64) * batch + rows
        tl.store(noisy + out, best, mask=rows < batch)
        tl.store(ids + out, first + at, mask=rows < batch)
        if temperature is not None:
            top = tl.max(logits, 0)
            total = tl.sum(tl.exp(logits - tl.where(top == float("-inf"), 0.0, top)[None, :]), 0)
            tl.store(tops + out, top, mask=rows < batch)
            tl.store(sums + out, total, mask=rows < batch)


@triton.jit
def best_tile(noisy, ids, tops, sums, y, log_z, tiles, batch, TILES: tl.constexpr, PDL: tl.constexpr):
    """The best draw of a row over all tiles, the lowest id among equals, and its log of the sum of exp(logit)."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row = tl.program_id(0)
    place = tl.arange(0, TILES)
    at, live = place.to(tl.int64) * batch + row, place < tiles
    value = tl.load(noisy + at, mask=live, other=float("-inf"))
    _, winner = tl.max(value, 0, return_indices=True, return_indices_tie_break_left=True)
    tl.store(y + row, tl.load(ids + winner.to(tl.int64) * batch + row).to(tl.int64))
    if tops is not None:
        top = tl.load(tops + at, mask=live, other=float("-inf"))
        greatest = tl.max(top, 0)
        total = tl.sum(tl.load(sums + at, mask=live, other=0) * tl.exp(top - greatest), 0)
        tl.store(log_z + row, greatest + tl.log(total))


@triton.jit
def packed(logits, ids):
    """int64 numbers that are ordered as the logits are, and among equals the lower id is the greater."""
    bits = (logits + 0.0).to(tl.int32, bitcast=True)
    ordered = bits ^ ((bits >> 31) & 0x7FFFFFFF)
    return (ordered.to(tl.int64) << 32) | (0x7FFFFFFF - ids).to(tl.int64)


@triton.jit
def keep_greatest(kept, fewer, count, MOST: tl.constexpr, KEEP: tl.constexpr, PDL: tl.constexpr):
    """The KEEP greatest of MOST of the `count` numbers of a row; `fewer`: [batch, programs a row, KEEP]."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    group, row = tl.program_id(0), tl.program_id(1).to(tl.int64)
    at = group * MOST + tl.arange(0, MOST)
    found = tl.load(kept + row * count + at, mask=at < count, other=-0x8000000000000000)
    out = (row * tl.num_programs(0) + group) * KEEP + tl.arange(0, KEEP)
    tl.store(fewer + out, tl.topk(found, KEEP))


@triton.jit
def draw_kept(kept, temperature, key, y, log_z, k, KEEP: tl.constexpr, PDL: tl.constexpr):
    """Draw among the k greatest logits of a row: `kept` [batch, KEEP] has them in order."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    row, place = tl.program_id(0), tl.arange(0, KEEP)
    found = tl.load(kept + row.to(tl.int64) * KEEP + place)
    ordered = (found >> 32).to(tl.int32)
    logit = (ordered ^ ((ordered >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)
    logit = tl.where(place < k, logit, float("-inf"))
    token = 0x7FFFFFFF - (found & 0x7FFFFFFF).to(tl.int32)
    zero = place * 0
    step = tl.load(key + 1).to(tl.int32)
    w0, w1, w2, w3 = tl.philox(tl.load(key), token // 4, zero + row, zero + step, zero)
    word = tl.where(token % 4 == 0, w0, tl.where(token % 4 == 1, w1, tl.where(token % 4 == 2, w2, w3)))
    noisy = logit + tl.where(tl.load(temperature + row) > 0, gumbel(word), 0.0)
    best = tl.max(noisy, 0)
    tl.store(y + row, tl.min(tl.where(noisy == best, token, 0x7FFFFFFF), 0).to(tl.int64))
    greatest = tl.max(logit, 0)
    tl.store(log_z + row, greatest + tl.log(tl.sum(tl.exp(logit - greatest), 0)))
