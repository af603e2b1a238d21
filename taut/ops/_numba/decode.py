"""Attention of one query a sequence over a long cache, bound by reading the cache once.

The keys are cut into chunks. A chunk of a key head is one piece of work, which all query heads of the group share; its
softmax is relative to its own peak, and the chunks are merged in order, whatever thread ran them.
"""

from __future__ import annotations

import numba as nb
import numpy as np

from taut.ops._numba.caches import KEYS, PATCH, as_read, asks_evenly, blend, tile
from taut.ops._numba.kernels import jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.rows import AHEAD, fetch, fetch_all
from taut.ops._numba.scalar import array, borrowed, down, exp, span, tanh, up
from taut.ops._numba.simd import dots, peak

HIDDEN = nb.float32(-np.inf)


@jit
def score(q, arranged, group, d, k, k_stride, count, stop, scores, stride, soon, k_tag):
    """scores[h, j] = q[h] . k[j]; the rows of scores are `stride` bytes apart. Asks for memory from `soon` on too.

    `arranged` has room for q; the last key ends at the address `stop`.
    """
    in_tiles = count >= KEYS and d % 16 == 0
    seen = as_read(k_tag, q, arranged, group, d) if in_tiles else q
    for h in range(0, group if in_tiles else 0, 4):
        x, to, some = seen + h * 4 * d, scores + h * stride, min(4, group - h)
        for start in range(0, count, KEYS):
            j = min(start, count - KEYS)
            rows, at = k + j * k_stride, to + 4 * j
            if h == 0 and asks_evenly(k_tag):
                fetch_all(soon + j * k_stride, 4 * k_stride)
            elif h == 0:
                fetch(soon + j * k_stride, 4 * k_stride)
                if rows + AHEAD < stop:
                    fetch(rows + AHEAD, 4 * k_stride)
            if some == 4:
                tile(k_tag, 4, x, 4 * d, rows, k_stride, d, at, stride)
            elif some == 3:
                tile(k_tag, 3, x, 4 * d, rows, k_stride, d, at, stride)
            elif some == 2:
                tile(k_tag, 2, x, 4 * d, rows, k_stride, d, at, stride)
            else:
                tile(k_tag, 1, x, 4 * d, rows, k_stride, d, at, stride)
    for h in range(0 if in_tiles else group):
        for j in range(count):
            dots(k_tag, 1, k + j * k_stride, q + h * 4 * d, 0, d, scores + h * stride + 4 * j)


@jit
def add_rows(weights, stride, group, v, v_stride, dv, count, out, after, v_tag):
    """out[h] += sum over j of weights[h, j] v[j]. Asks meanwhile for memory from `after` on."""
    whole = dv // 16 * 16
    for first in range(0, count, PATCH):
        rows, next_, many = v + first * v_stride, after + first * v_stride, min(PATCH, count - first)
        for h in range(0, group, 4):
            w, to, some = weights + h * stride + 4 * first, out + h * 4 * dv, min(4, group - h)
            if some == 4:
                blend(v_tag, 4, w, stride, rows, v_stride, many, whole, to, 4 * dv, next_)
            elif some == 3:
                blend(v_tag, 3, w, stride, rows, v_stride, many, whole, to, 4 * dv, next_)
            elif some == 2:
                blend(v_tag, 2, w, stride, rows, v_stride, many, whole, to, 4 * dv, next_)
            else:
                blend(v_tag, 1, w, stride, rows, v_stride, many, whole, to, 4 * dv, next_)
    for h in range(group if whole < dv else 0):
        add_features(weights + h * stride, whole, v, v_stride, dv, count, out + h * 4 * dv, v_tag)


@jit
def add_features(weights, first, v, v_stride, dv, count, out, v_tag):
    """The same for one head, from feature `first` on, one by one."""
    to, shares = array(out, dv, np.float32(0)), array(weights, count, np.float32(0))
    for i in range(first, dv):
        total = to[i]
        for j in range(count):
            total += shares[j] * up(array(v + j * v_stride, dv, v_tag)[i])
        to[i] = total


@jit
def adjust(row, ago, cap, slope, mask, additive, mask_tag):
    """Softcap, ALiBi and mask on a row of scores; `ago` is how many positions back its first key stands."""
    count = len(row)
    if cap > 0:
        for j in range(count):
            row[j] = cap * tanh(row[j] / cap)
    if slope != 0:
        for j in range(count):
            row[j] -= slope * nb.float32(ago - j)
    if mask:
        marks = array(mask, count, mask_tag)
        if additive:
            for j in range(count):
                row[j] += up(marks[j])
        else:
            for j in range(count):
                row[j] = row[j] if marks[j] != 0 else HIDDEN


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
          scores, peaks, totals, out, arranged, soon, after, k_tag, mask_tag):  # fmt: skip
    """One chunk of keys for the heads of a group: (peak, total, weighted sum of values) of each.

    `arranged` has room for the queries of the group. Memory from `soon` on is asked for while keys are read, and from
    `after` on while values are.
    """
    count, size = last - first, array(mask, 1, mask_tag).itemsize
    out[:] = 0
    if mask and mask_stride == 0 and not additive and unseen(mask + first * size, count, mask_tag):
        peaks[:], totals[:] = HIDDEN, 0
        return
    stride, weights, sums = 4 * scores.shape[1], np.int64(scores.ctypes.data), np.int64(out.ctypes.data)
    k_at, v_at, stop = k + first * k_stride, v + first * v_stride, k + keys * k_stride
    near = following(k_tag, count, k_stride)
    far = count - near
    score(q, arranged, group, d, k_at, k_stride, far, stop, weights, stride, k_at + near * k_stride, k_tag)
    k_at += far * k_stride
    score(q, arranged, group, d, k_at, k_stride, near, stop, weights + 4 * far, stride, soon, k_tag)
    slopes = array(alibi, head + group, np.float32(0))
    for h in range(group):
        slope = slopes[head + h] if alibi else nb.float32(0)
        marks = mask + h * mask_stride + first * size if mask else 0
        adjust(scores[h, :count], keys - 1 - first, cap, slope, marks, additive, mask_tag)
        peaks[h], totals[h] = weigh(scores[h, :count])
    near = following(k_tag, count, v_stride)
    far = count - near
    add_rows(weights, stride, group, v_at, v_stride, dv, far, sums, v_at + near * v_stride, k_tag)
    add_rows(weights + 4 * far, stride, group, v_at + far * v_stride, v_stride, dv, near, sums, after, k_tag)


@jit
def following(k_tag, count, stride):
    """The last rows of so many while which what comes after them is asked for: for the others, rows of their own."""
    few = AHEAD // stride + KEYS
    return count - (count - few) // KEYS * KEYS if asks_evenly(k_tag) and few < count else count


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


@jit
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
        soon = v + b * v_strides[0] + kv * v_strides[1] + first * v_strides[2]
        after = k + next_ // chunks // kv_heads * k_strides[0] + next_ // chunks % kv_heads * k_strides[1]
        after += (lowest + next_ % chunks * step) * k_strides[2]
        marks = mask + b * mask_strides[0] + kv * group * mask_strides[1] if mask else 0
        chunk(wide[head].ctypes.data, group, d, k + b * k_strides[0] + kv * k_strides[1], k_strides[2],
              v + b * v_strides[0] + kv * v_strides[1], v_strides[2], dv, keys, first, last, cap, alibi, kv * group,
              marks, mask_strides[1], additive, scores, peaks[c, mine], totals[c, mine], sums[c, mine],
              arranged.ctypes.data, soon, after, k_tag, mask_tag)  # fmt: skip


share_pieces = shared(pieces)


@jit
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
