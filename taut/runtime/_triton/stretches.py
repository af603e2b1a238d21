"""Attention of one row over few keys, in stretches that the product behind it joins.

A program has one query head and one stretch of the keys, so that there are enough programs for a GPU, and works on the
ordinary cores: a head of its own needs no tensor core, and keys and values stay in the registers into which they are
loaded before the kernel before this one has ended. Few registers matter: with many, programs start only when the
product before them has left (half a multiprocessor each: 5.2 us of a layer of a 135M model on an H200).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.runtime._triton.attend import LOG2E, angles, pairs, tile, turned
from taut.runtime._triton.dense import tanh


@triton.jit
def weighed(keys, values, at, end, query, position, slope, scale, cap, greatest, weight, sums, CAP: tl.constexpr):
    """The greatest score, the sum of weights and the weighed values so far, with those of a tile below `end`."""
    scores = tl.sum(keys.to(tl.float32) * query, 1) * scale
    if CAP:
        scores = cap * tanh(scores / cap)
    scores -= slope * (position - at).to(tl.float32)
    scores = tl.where(at < end, scores * LOG2E, float("-inf"))
    higher = tl.maximum(greatest, tl.max(scores, 0))
    shrink, p = tl.exp2(greatest - higher), tl.exp2(scores - higher)
    sums = sums * shrink + tl.sum(p[:, None] * values.to(tl.float32), 0)
    return higher, weight * shrink + tl.sum(p, 0), sums


@triton.jit
def stretch(
    q,
    k,
    v,
    keys,
    values,
    positions,
    slots,
    cos,
    sin,
    q_gain,
    q_shift,
    k_gain,
    k_shift,
    first,
    alibi,
    found,
    logs,
    key_slot,
    key_head,
    value_slot,
    value_head,
    scale,
    cap,
    q_eps,
    k_eps,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    DV: tl.constexpr,
    VWIDTH: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    Q_NORM: tl.constexpr,
    Q_CENTRED: tl.constexpr,
    K_NORM: tl.constexpr,
    K_CENTRED: tl.constexpr,
    CAP: tl.constexpr,
    KEYS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (heads, stretches). GROUP query heads have a key head; WIDTH and VWIDTH are D and DV rounded up. Without
    `k` nothing is appended. `found` is float32 [stretches, heads, DV], divided; `logs` [stretches, heads] are the
    logarithms to base 2 of the sums, -inf where a stretch has no keys."""
    if PDL:
        gdc_launch_dependents()
    head, part = tl.program_id(0), tl.program_id(1)
    position, slot = tl.load(positions).to(tl.int32), tl.load(slots)
    lowest = 0
    if first is not None:
        lowest = tl.load(first + position).to(tl.int32)
    seen = position + 1 - lowest
    length = tl.cdiv(tl.cdiv(seen, tl.num_programs(1)), KEYS) * KEYS
    begin = lowest + part * length
    end = tl.minimum(begin + length, position + 1)
    feature, value = tl.arange(0, WIDTH), tl.arange(0, VWIDTH)
    k_base = keys + slot * key_slot + (head // GROUP) * key_head
    v_base = values + slot * value_slot + (head // GROUP) * value_head
    cached = end
    if k is not None:  # the token's own key and value do not come from the cache
        cached = tl.minimum(end, position)
    if PDL and k is None:  # what is read was appended by an attention before this one
        gdc_wait()
    at = begin + tl.arange(0, KEYS)
    block, held = tile(k_base, at, cached, feature, D), tile(v_base, at, cached, value, DV)
    c, s = angles(cos, sin, position, feature, HALF, INTERLEAVED)
    one, whole = tl.arange(0, 1), (tl.arange(0, 1) == 0)[:, None] & (feature < D)[None, :]
    if PDL and k is not None:
        gdc_wait()
    to = part * tl.num_programs(0) + head
    if begin < end:
        xq, pq = pairs(q + head * D + one, feature, whole, HALF, INTERLEAVED)
        if k is not None:
            last = end > position
            xk, pk = pairs(k + (head // GROUP) * D + one, feature, whole & last, HALF, INTERLEAVED)
            base = v + (head // GROUP) * DV
            new = tl.load(base + value, mask=(value < DV) & last, other=0, cache_modifier=".cg").to(held.dtype)
        query = turned(xq, pq, c, s, feature, whole, q_gain, q_shift, q_eps, D, HALF, INTERLEAVED, Q_NORM, Q_CENTRED)
        greatest = tl.full([], float("-inf"), tl.float32)
        weight = tl.full([], 0.0, tl.float32)
        sums = tl.zeros([VWIDTH], tl.float32)
        if k is not None:
            key = turned(
                xk, pk, c, s, feature, whole, k_gain, k_shift, k_eps, D, HALF, INTERLEAVED, K_NORM, K_CENTRED
            ).to(block.dtype)  # fmt: skip
            place, appends = position.to(tl.int64), last & (head % GROUP == 0)
            tl.store(k_base + place * D + feature[None, :], key, mask=whole & appends)
            tl.store(v_base + place * DV + value, new, mask=(value < DV) & appends)
            own = tl.sum(tl.sum(key.to(tl.float32) * query, 1), 0) * scale
            if CAP:
                own = cap * tanh(own / cap)
            greatest = tl.where(last, own * LOG2E, float("-inf"))
            weight += tl.where(last, 1.0, 0.0)
            sums += new.to(tl.float32)  # zeros where it is not this program's
        slope = 0.0 if alibi is None else tl.load(alibi + head)
        greatest, weight, sums = weighed(
            block, held, at, cached, query, position, slope, scale, cap, greatest, weight, sums, CAP
        )
        for start in range(begin + KEYS, cached, KEYS):
            at = start + tl.arange(0, KEYS)
            block, held = tile(k_base, at, cached, feature, D), tile(v_base, at, cached, value, DV)
            greatest, weight, sums = weighed(
                block, held, at, cached, query, position, slope, scale, cap, greatest, weight, sums, CAP
            )
        tl.store(found + to * DV + value, sums / weight, mask=value < DV)
        tl.store(logs + to, greatest + tl.log2(weight))
    else:
        tl.store(logs + to, float("-inf"))
