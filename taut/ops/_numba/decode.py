"""Attention of one query a sequence over a long cache, bound by reading the cache once.

The keys are cut into chunks. A chunk of a key head is one piece of work, which all query heads of the group share; its
softmax is relative to its own peak, and the chunks are merged in order, whatever thread ran them.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from taut.ops._numba.caches import KEYS, as_read, as_written, blend, tile
from taut.ops._numba.kernels import allocating, jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.rows import NEAR
from taut.ops._numba.scalar import array, borrowed, down, exp, span, tanh, up
from taut.ops._numba.simd import dots, peak

HIDDEN = nb.float32(-np.inf)
PATCH = 8
"""Rows of each stream that several passes add up one after the other: few enough to stay in the first cache."""


@jit
def score(q, arranged, group, d, k, k_stride, count, quarter, scores, stride, soon, soon_apart, k_tag):
    """scores[h, i] = q[h] . key `place_of(i, quarter)`, of the first `count` keys.

    The rows of scores are `stride` bytes apart, and `arranged` has room for q. With a quarter d is a multiple of 16.
    What comes after the keys, from `soon` on in four streams `soon_apart` bytes apart, is asked for as they end.
    """
    seen = as_read(k_tag, q, arranged, group, d) if quarter else q
    near, apart = NEAR // k_stride, quarter * k_stride
    for j in range(quarter):
        rows, at, ahead, ahead_apart = k + j * k_stride, scores + 4 * KEYS * j, k + (j + near) * k_stride, apart
        if j + near >= quarter:
            ahead, ahead_apart = soon + (j + near - quarter) * k_stride, soon_apart
        for h in range(0, group, 4):
            x, to, some = seen + h * 4 * d, at + h * stride, min(4, group - h)
            if some == 4:
                tile(k_tag, 4, x, 4 * d, rows, apart, d, to, stride, ahead, ahead_apart)
            elif some == 3:
                tile(k_tag, 3, x, 4 * d, rows, apart, d, to, stride, ahead, ahead_apart)
            elif some == 2:
                tile(k_tag, 2, x, 4 * d, rows, apart, d, to, stride, ahead, ahead_apart)
            else:
                tile(k_tag, 1, x, 4 * d, rows, apart, d, to, stride, ahead, ahead_apart)
    for h in range(group):
        for j in range(KEYS * quarter, count):
            dots(k_tag, 1, k + j * k_stride, q + h * 4 * d, 0, d, scores + h * stride + 4 * j)


@jit
def place_of(i, quarter):
    """Which key has the i-th score, where keys are taken from four quarters by turns."""
    return i % KEYS * quarter + i // KEYS if i < KEYS * quarter else i


@jit
def add_rows(weights, stride, group, v, v_stride, dv, count, quarter, out, soon, soon_apart, v_tag):
    """out[h] += sum over i of weights[h, i] v[place_of(i, quarter)]. `soon` is as in `score`."""
    whole, apart = dv // 16 * 16, quarter * v_stride
    patch = PATCH if group > 4 else max(quarter, 1)
    for first in range(0, quarter, patch):
        rows, w, many = v + first * v_stride, weights + 4 * KEYS * first, min(patch, quarter - first)
        blend_rows(
            w, stride, group, rows, v_stride, apart, many, whole, out, 4 * dv, quarter - first, soon, soon_apart, v_tag
        )
    if quarter:
        as_written(v_tag, out, 4 * dv, group, whole)
    for h in range(group):
        to, shares = array(out + h * 4 * dv, dv, np.float32(0)), array(weights + h * stride, count, np.float32(0))
        for i in range(count if whole < dv else 0):
            add_features(shares[i], array(v + place_of(i, quarter) * v_stride, dv, v_tag), whole, dv, to)
        for i in range(KEYS * quarter, count):
            add_features(shares[i], array(v + i * v_stride, dv, v_tag), 0, whole, to)


@jit
def add_features(share, row, first, last, to):
    for i in range(first, last):
        to[i] += share * up(row[i])


@jit
def blend_rows(w, stride, group, rows, v_stride, apart, many, whole, out, out_stride, left, soon, soon_apart, v_tag):
    """`blend` for any number of queries."""
    near = NEAR // v_stride
    for h in range(0, group, 4):
        shares, to, some = w + h * stride, out + h * out_stride, min(4, group - h)
        if some == 4:
            blend(v_tag, 4, shares, stride, rows, v_stride, apart, many, whole, to, out_stride, near, left,
                  soon, soon_apart)  # fmt: skip
        elif some == 3:
            blend(v_tag, 3, shares, stride, rows, v_stride, apart, many, whole, to, out_stride, near, left,
                  soon, soon_apart)  # fmt: skip
        elif some == 2:
            blend(v_tag, 2, shares, stride, rows, v_stride, apart, many, whole, to, out_stride, near, left,
                  soon, soon_apart)  # fmt: skip
        else:
            blend(v_tag, 1, shares, stride, rows, v_stride, apart, many, whole, to, out_stride, near, left,
                  soon, soon_apart)  # fmt: skip


@jit
def adjust(row, quarter, ago, cap, slope, mask, additive, mask_tag):
    """Softcap, ALiBi and mask on a row of scores in the order of `place_of`; `ago` is how far back its first key is."""
    count = len(row)
    if cap > 0:
        for i in range(count):
            row[i] = cap * tanh(row[i] / cap)
    if slope != 0:
        for i in range(count):
            row[i] -= slope * nb.float32(ago - place_of(i, quarter))
    if mask:
        marks = array(mask, count, mask_tag)
        if additive:
            for i in range(count):
                row[i] += up(marks[place_of(i, quarter)])
        else:
            for i in range(count):
                row[i] = row[i] if marks[place_of(i, quarter)] != 0 else HIDDEN


@jit
def weigh(row):
    """Turn a row of scores into softmax weights relative to its peak; (peak, sum of the weights)."""
    top, total = peak(row.ctypes.data, len(row)), nb.float32(0)
    if top == HIDDEN:
        for j in range(len(row)):
            row[j] = nb.float32(0) if row[j] == HIDDEN else row[j]
            total += row[j]
        return top, total
    for j in range(len(row)):
        weight = exp(row[j] - top)
        row[j] = weight
        total += weight
    return top, total


@jit
def unseen(mask, count, mask_tag):
    """Whether a boolean mask hides all keys."""
    marks = array(mask, count, mask_tag)
    seen = 0
    for j in range(count):
        seen += marks[j] != 0
    return seen == 0


@jit
def chunk(q, group, d, k, k_stride, v, v_stride, dv, keys, first, last, cap, alibi, head, mask, mask_stride, additive,
          scores, peaks, totals, out, arranged, after, after_apart, k_tag, mask_tag):  # fmt: skip
    """One chunk of keys for the heads of a group: (peak, total, weighted sum of values) of each.

    `arranged` has room for the queries of the group. As the values end, memory from `after` on is asked for, in four
    streams `after_apart` bytes apart.
    """
    count, size = last - first, array(mask, 1, mask_tag).itemsize
    out[:] = 0
    if mask and mask_stride == 0 and not additive and unseen(mask + first * size, count, mask_tag):
        peaks[:], totals[:] = HIDDEN, 0
        return
    stride, weights, sums = 4 * scores.shape[1], np.int64(scores.ctypes.data), np.int64(out.ctypes.data)
    quarter = count // KEYS if d % 16 == 0 else 0
    k_at, v_at, v_apart = k + first * k_stride, v + first * v_stride, quarter * v_stride
    score(q, arranged, group, d, k_at, k_stride, count, quarter, weights, stride, v_at, v_apart, k_tag)
    slopes = array(alibi, head + group, np.float32(0))
    for h in range(group):
        slope = slopes[head + h] if alibi else nb.float32(0)
        marks = mask + h * mask_stride + first * size if mask else 0
        adjust(scores[h, :count], quarter, keys - 1 - first, cap, slope, marks, additive, mask_tag)
        peaks[h], totals[h] = weigh(scores[h, :count])
    add_rows(weights, stride, group, v_at, v_stride, dv, count, quarter, sums, after, after_apart, k_tag)


@jit
def merge(peaks, totals, parts, sink, to, tag):
    """to = the softmax over all chunks of one head; `sink` is a logit that only adds to the denominator.

    The first of the parts is overwritten.
    """
    top, total = sink, nb.float32(0)
    for c in range(len(peaks)):
        top = peaks[c] if peaks[c] > top else top
    if sink > HIDDEN:
        total = exp(sink - top)
    sums = parts[0]
    for c in range(len(peaks)):
        factor = exp(peaks[c] - top) if peaks[c] > HIDDEN else nb.float32(1)
        total += factor * totals[c]
        if c == 0:
            for i in range(len(sums)):
                sums[i] *= factor
        else:
            for i in range(len(sums)):
                sums[i] += factor * parts[c, i]
    for i in range(len(sums)):
        to[i] = down(sums[i] / total if total != 0 else nb.float32(0), tag)


@allocating
def pieces(part, parts, wide, k, k_strides, v, v_strides, shape, cap, mask, mask_strides, additive, alibi,
           peaks, totals, sums, k_tag, mask_tag):  # fmt: skip
    """The part-th share of all chunks of all key heads of all sequences."""
    batch, heads, kv_heads, lowest, keys, step = shape
    wide, peaks, totals, sums = borrowed(wide), borrowed(peaks), borrowed(totals), borrowed(sums)
    chunks, dv, d, group = sums.shape[0], sums.shape[2], wide.shape[1], heads // kv_heads
    scores, arranged = np.empty((group, step), np.float32), np.empty((group, d), np.float32)
    begin, end = span(batch * kv_heads * chunks, part, parts)
    for piece in range(begin, end):
        b, kv, c = piece // chunks // kv_heads, piece // chunks % kv_heads, piece % chunks
        head, first = b * heads + kv * group, lowest + c * step
        mine, last = slice(head, head + group), min(first + step, keys)
        next_ = min(piece + 1, end - 1)
        after = k + next_ // chunks // kv_heads * k_strides[0] + next_ // chunks % kv_heads * k_strides[1]
        after += (lowest + next_ % chunks * step) * k_strides[2]
        marks = mask + b * mask_strides[0] + kv * group * mask_strides[1] if mask else 0
        chunk(wide[head].ctypes.data, group, d, k + b * k_strides[0] + kv * k_strides[1], k_strides[2],
              v + b * v_strides[0] + kv * v_strides[1], v_strides[2], dv, keys, first, last, cap, alibi, kv * group,
              marks, mask_strides[1], additive, scores, peaks[c, mine], totals[c, mine], sums[c, mine],
              arranged.ctypes.data, after, step // KEYS * k_strides[2], k_tag, mask_tag)  # fmt: skip


share_pieces = shared(pieces)


@allocating
def attention(q, k, k_strides, v, v_strides, y, batch, heads, kv_heads, d, dv, lowest, keys, step, scale, cap, mask,
              mask_strides, additive, sinks, alibi, parts, tag, k_tag, mask_tag):  # fmt: skip
    """y (batch, heads, dv) from q (batch, heads, d); strides are (batch, head, row) in bytes."""
    chunks = (keys - lowest + step - 1) // step
    stored, wide = array(q, (batch * heads, d), tag), np.empty((batch * heads, d), np.float32)
    for h in range(batch * heads):
        for i in range(d):
            wide[h, i] = up(stored[h, i]) * nb.float32(scale)
    peaks, totals = np.empty((chunks, batch * heads), np.float32), np.empty((chunks, batch * heads), np.float32)
    sums = np.empty((chunks, batch * heads, dv), np.float32)
    shape = batch, heads, kv_heads, lowest, keys, step
    arguments = (wide, k, k_strides, v, v_strides, shape, nb.float32(cap), mask, mask_strides, additive, alibi,
                 peaks, totals, sums, k_tag, mask_tag)  # fmt: skip
    share_pieces(min(parts, batch * kv_heads * chunks), arguments)
    to, logits = array(y, (batch * heads, dv), tag), array(sinks, heads, np.float32(0))
    for h in range(batch * heads):
        merge(peaks[:, h], totals[:, h], sums[:, h], logits[h % heads] if sinks else HIDDEN, to[h], tag)
