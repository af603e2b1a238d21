"""Attention of one row over few keys, in stretches that the product behind it joins.

A program has one query head and one tile of the keys, so that there are enough programs for a GPU, and works on the
ordinary cores: a head of its own needs no tensor core, and keys and values stay in the registers into which they are
loaded before the kernel before this one has ended. A second tile would be waited for: 3 us of a layer of a 135M model
on an H200, where the first takes 2.4. Few registers matter: with many, programs start only when the product before
them has left (half a multiprocessor each: 5.2 us).
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.runtime._triton.attend import LOG2E, angles, pairs, tile, turned
from taut.runtime._triton.dense import tanh


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
    """Grid (heads, stretches), which have to have room for all keys: each holds KEYS of them. GROUP query heads have a
    key head; WIDTH and VWIDTH are D and DV rounded up. Without `k` nothing is appended. `found` is float32 [stretches,
    heads, DV], divided; `logs` [stretches, heads] are the logarithms to base 2 of the sums, -inf where a stretch has no
    keys."""
    if PDL:
        gdc_launch_dependents()
    head, part = tl.program_id(0), tl.program_id(1)
    position, slot = tl.load(positions).to(tl.int32), tl.load(slots)
    lowest = 0
    if first is not None:
        lowest = tl.load(first + position).to(tl.int32)
    begin = lowest + part * KEYS
    end = tl.minimum(begin + KEYS, position + 1)
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
        scores = tl.sum(block.to(tl.float32) * query, 1) * scale
        if CAP:
            scores = cap * tanh(scores / cap)
        if alibi is not None:
            scores -= tl.load(alibi + head) * (position - at).to(tl.float32)
        scores = tl.where(at < cached, scores * LOG2E, float("-inf"))
        greatest = tl.max(scores, 0)
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
            own = tl.where(last, own * LOG2E, float("-inf"))
            greatest = tl.maximum(greatest, own)
        p = tl.exp2(scores - greatest)
        weight, sums = tl.sum(p, 0), tl.sum(p[:, None] * held.to(tl.float32), 0)
        if k is not None:
            own = tl.exp2(own - greatest)
            weight += own
            sums += own * new.to(tl.float32)
        tl.store(found + to * DV + value, sums / weight, mask=value < DV)
        tl.store(logs + to, greatest + tl.log2(weight))
    else:
        tl.store(logs + to, float("-inf"))
