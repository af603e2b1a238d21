"""Attention of one new token a row: heads normed and turned, key and value appended, and all keys that it may see.

Each program has the query heads of one key head, and a stretch of the keys; stretches are of equal length, at least
`least` keys, so that a short text needs one and no joining. Keys that stood in the cache before this token are loaded
before the kernel before this one has ended. Whoever finishes last joins the stretches in the order of the keys, so
that the bits are the same in every run, and leaves the counter as it was. The position is read on the device: a CUDA
graph may be replayed.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.runtime._triton.dense import tanh

LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def partners(feature, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """The feature that each is turned with, the number of their angle, and whether it is the first of the two."""
    if INTERLEAVED:
        partner, angle, low = feature ^ 1, feature // 2, feature % 2 == 0
    else:
        low = feature < HALF
        partner, angle = tl.where(low, feature + HALF, feature - HALF), tl.where(low, feature, feature - HALF)
    return partner, angle, low


@triton.jit
def angles(cos, sin, position, feature, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Cosine and sine of every feature; 1 and 0 for one that is not turned."""
    c, s = tl.full(feature.shape, 1.0, tl.float32), tl.zeros(feature.shape, tl.float32)
    if HALF > 0:
        _, angle, _ = partners(feature, HALF, INTERLEAVED)
        turns = feature < 2 * HALF
        c = tl.load(cos + position * HALF + angle, mask=turns, other=1)
        s = tl.load(sin + position * HALF + angle, mask=turns, other=0)
    return c, s


@triton.jit
def pairs(base, feature, live, HALF: tl.constexpr, INTERLEAVED: tl.constexpr):
    """Heads at base[:, None] + feature[None, :], and what each of their features is turned with."""
    x = tl.load(base[:, None] + feature[None, :], mask=live, other=0, cache_modifier=".cg").to(tl.float32)
    p = x
    if HALF > 0:
        partner, _, _ = partners(feature, HALF, INTERLEAVED)
        turning = live & (feature < 2 * HALF)[None, :]
        p = tl.load(base[:, None] + partner[None, :], mask=turning, other=0, cache_modifier=".cg").to(tl.float32)
    return x, p


@triton.jit
def turned(
    x,
    p,
    c,
    s,
    feature,
    live,
    gain,
    shift,
    eps,
    D: tl.constexpr,
    HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
):
    """Heads normed each by itself, and their first 2 HALF features turned; x and p are those of `pairs`, c and s those
    of `angles`. All are loaded before anything is computed, so that the loads do not wait for each other."""
    partner, _, low = partners(feature, HALF, INTERLEAVED)
    if NORM:
        mean = tl.zeros([x.shape[0]], tl.float32)
        if CENTRED:
            mean = tl.sum(x, 1) / D
        left = tl.where(live, x - mean[:, None], 0.0)
        inv = tl.rsqrt(tl.sum(left * left, 1) / D + eps)
        x = normed(x, mean, inv, gain, shift, feature, D)
        if HALF > 0:
            p = normed(p, mean, inv, gain, shift, tl.where(feature < 2 * HALF, partner, 0), D)
    if HALF > 0:
        x = x * c[None, :] + tl.where(low[None, :], -p, p) * s[None, :]
    return x


@triton.jit
def normed(x, mean, inv, gain, shift, feature, D: tl.constexpr):
    y = (x - mean[:, None]) * inv[:, None]
    if gain is not None:
        y *= tl.load(gain + feature, mask=feature < D, other=0)[None, :]
    if shift is not None:
        y += tl.load(shift + feature, mask=feature < D, other=0)[None, :]
    return y


@triton.jit
def attend(
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
    sinks,
    scratch,
    counters,
    y,
    q_stride,
    k_stride,
    v_stride,
    y_stride,
    key_slot,
    key_head,
    value_slot,
    value_head,
    scale,
    cap,
    q_eps,
    k_eps,
    least,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
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
    SPLITS: tl.constexpr,
    PARTS: tl.constexpr,
    MEMBERS: tl.constexpr,
    PDL: tl.constexpr,
):
    """Grid (rows, key heads, SPLITS). GROUP query heads a key head; ROWS, WIDTH and VWIDTH are GROUP, D and DV rounded
    up. Without `k` nothing is appended. `scratch` is float32 [rows, key heads, SPLITS, GROUP, DV + 2]: sums, greatest
    score and sum of weights of a stretch; `counters` int32 [rows, key heads], zeros."""
    if PDL:
        gdc_launch_dependents()
    row, head, part = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    position, slot = tl.load(positions + row).to(tl.int32), tl.load(slots + row)
    lowest = 0
    if first is not None:
        lowest = tl.load(first + position).to(tl.int32)
    seen = position + 1 - lowest
    stretch = tl.cdiv(tl.maximum(tl.cdiv(seen, SPLITS), least), KEYS) * KEYS
    parts = tl.cdiv(seen, stretch)
    begin = lowest + part * stretch
    end = tl.minimum(begin + stretch, position + 1)
    member, feature, value = tl.arange(0, ROWS), tl.arange(0, WIDTH), tl.arange(0, VWIDTH)
    k_base = keys + slot * key_slot + head * key_head
    v_base = values + slot * value_slot + head * value_head
    cached = end
    if k is not None:  # the token's own key and value do not come from the cache
        cached = tl.minimum(end, position)
    if PDL and k is None:  # what is read was appended by an attention before this one
        gdc_wait()
    at = begin + tl.arange(0, KEYS)
    first_keys = tile(k_base, at, cached, feature, D)
    first_values = tile(v_base, at, cached, value, DV)
    c, s = angles(cos, sin, position, feature, HALF, INTERLEAVED)
    heads = head * GROUP + member
    fits = (member < GROUP)[:, None] & (feature < D)[None, :]
    written = (member < GROUP)[:, None] & (value < DV)[None, :]
    out = y + row.to(tl.int64) * y_stride + (head * GROUP) * DV
    pair = row * tl.num_programs(1) + head
    joining = scratch + pair.to(tl.int64) * SPLITS * GROUP * (DV + 2)
    if PDL and k is not None:
        gdc_wait()
    if part < parts:
        xq, pq = pairs(q + row.to(tl.int64) * q_stride + heads * D, feature, fits, HALF, INTERLEAVED)
        if k is not None:  # the last program alone has them, but a branch would wait for the queries first
            last = part == parts - 1
            base = k + row.to(tl.int64) * k_stride + head * D + tl.arange(0, 1)
            whole = (tl.arange(0, 1) == 0)[:, None] & (feature < D)[None, :] & last
            xk, pk = pairs(base, feature, whole, HALF, INTERLEAVED)
            base = v + row.to(tl.int64) * v_stride + head * DV
            new = tl.load(base + value, mask=(value < DV) & last, other=0, cache_modifier=".cg").to(first_values.dtype)
        query = turned(xq, pq, c, s, feature, fits, q_gain, q_shift, q_eps, D, HALF, INTERLEAVED, Q_NORM, Q_CENTRED)
        query = query.to(first_keys.dtype)
        greatest = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, VWIDTH], tl.float32)
        if k is not None:
            key = turned(
                xk, pk, c, s, feature, whole, k_gain, k_shift, k_eps, D, HALF, INTERLEAVED, K_NORM, K_CENTRED
            ).to(first_keys.dtype)  # fmt: skip
            place = position.to(tl.int64)
            tl.store(k_base + place * D + feature[None, :], key, mask=whole)
            tl.store(v_base + place * DV + value, new, mask=(value < DV) & last)
            own = tl.sum(query.to(tl.float32) * key.to(tl.float32), 1) * scale
            if CAP:
                own = cap * tanh(own / cap)
            greatest = tl.where(last, own * LOG2E, float("-inf"))
            weight += tl.where(last, 1.0, 0.0)
            sums += new.to(tl.float32)[None, :]
        if alibi is not None:
            slope = tl.load(alibi + heads, mask=member < GROUP, other=0)
        block, held = first_keys, first_values
        for start in range(begin, cached, KEYS):
            at = start + tl.arange(0, KEYS)
            scores = tl.dot(query, block.T, input_precision="ieee") * scale
            now = held  # the next tile is on its way while this one is weighed
            block = tile(k_base, at + KEYS, cached, feature, D)
            held = tile(v_base, at + KEYS, cached, value, DV)
            if CAP:
                scores = cap * tanh(scores / cap)
            if alibi is not None:
                scores -= slope[:, None] * (position - at).to(tl.float32)[None, :]
            scores = tl.where((at < cached)[None, :], scores * LOG2E, float("-inf"))
            higher = tl.maximum(greatest, tl.max(scores, 1))
            shrink = tl.exp2(greatest - higher)
            p = tl.exp2(scores - higher[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(now.dtype), now, sums * shrink[:, None], input_precision="ieee")
            greatest = higher
        if parts == 1:
            if sinks is not None:
                sink = tl.load(sinks + heads, mask=member < GROUP, other=0) * LOG2E
                higher = tl.maximum(greatest, sink)
                shrink = tl.exp2(greatest - higher)
                sums *= shrink[:, None]
                weight = weight * shrink + tl.exp2(sink - higher)
            divided = (sums / weight[:, None]).to(y.dtype.element_ty)
            tl.store(out + member[:, None] * DV + value[None, :], divided, mask=written)
        else:
            mine = joining + (part * GROUP + member) * (DV + 2)
            tl.store(mine[:, None] + value[None, :], sums, mask=written)
            tl.store(mine + DV, greatest, mask=(member < GROUP))
            tl.store(mine + DV + 1, weight, mask=(member < GROUP))
            tl.debug_barrier()  # all of this program's stores come before its arrival
            arrived = tl.atomic_add(counters + pair, 1, sem="acq_rel")
            if arrived == parts - 1:
                tl.store(counters + pair, 0)
                joined(
                    joining, sinks, head * GROUP, out, parts, GROUP, MEMBERS, DV,
                    VWIDTH, PARTS
                )  # fmt: skip


@triton.jit
def tile(base, at, end, feature, D: tl.constexpr):
    """Rows `at` below `end` of D features each; zeros elsewhere."""
    mask = (at < end)[:, None] & (feature < D)[None, :]
    return tl.load(base + at[:, None].to(tl.int64) * D + feature[None, :], mask=mask, other=0)


@triton.jit
def joined(
    scratch, sinks, head, out, parts, GROUP: tl.constexpr, MEMBERS: tl.constexpr, DV: tl.constexpr,
    VWIDTH: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """Join the stretches of GROUP query heads from `head` on, PARTS at a time in the order of the keys."""
    member, value = tl.arange(0, MEMBERS), tl.arange(0, VWIDTH)
    greatest = tl.full([MEMBERS], float("-inf"), tl.float32)
    weight = tl.zeros([MEMBERS], tl.float32)
    if sinks is not None:
        greatest = tl.load(sinks + head + member, mask=member < GROUP, other=0).to(tl.float32) * LOG2E
        weight += 1.0
    sums = tl.zeros([MEMBERS, VWIDTH], tl.float32)
    for start in range(0, parts, PARTS):
        part = start + tl.arange(0, PARTS)
        live = (part < parts)[:, None] & (member < GROUP)[None, :]
        place = scratch + (part[:, None] * GROUP + member[None, :]) * (DV + 2)
        high = tl.load(place + DV, mask=live, other=float("-inf"), cache_modifier=".cg")
        portion = tl.load(place + DV + 1, mask=live, other=0, cache_modifier=".cg")
        both = live[:, :, None] & (value < DV)[None, None, :]
        found = tl.load(place[:, :, None] + value[None, None, :], mask=both, other=0, cache_modifier=".cg")
        higher = tl.maximum(tl.maximum(greatest, tl.max(high, 0)), -3e38)
        shrink, factor = tl.exp2(greatest - higher), tl.exp2(high - higher[None, :])
        weight = weight * shrink + tl.sum(portion * factor, 0)
        sums = sums * shrink[:, None] + tl.sum(found * factor[:, :, None], 0)
        greatest = higher
    written = (member < GROUP)[:, None] & (value < DV)[None, :]
    found = (sums / tl.where(weight == 0, 1.0, weight)[:, None]).to(out.dtype.element_ty)
    tl.store(out + member[:, None] * DV + value[None, :], found, mask=written)
