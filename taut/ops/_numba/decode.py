"""Attention of one query a sequence over a long cache, bound by reading the cache once.

The keys are cut into chunks. Each chunk of each key head is one piece of work, which all query heads of the group
share; its softmax is relative to its own peak, and the chunks are merged in order, whatever thread ran them.
"""

from __future__ import annotations

import numba as nb
import numpy as np
from numba import njit, prange

from taut.ops._numba.scalar import JIT, array, exp, span, tanh, up
from taut.ops._numba.simd import blend, dots

HIDDEN = nb.float32(-np.inf)


@njit(**JIT)
def score(k, k_stride, q, scores, first, last, group, d, width, k_tag):
    """scores[h, j - first] = q[h] . k[j]"""
    room = np.empty(4, np.float32)
    to, stride, x = room.ctypes.data, 4 * d, q.ctypes.data
    for j in range(first, last):
        row = k + j * k_stride
        h = 0
        while h < group:
            some = min(4, group - h)
            if some == 4:
                dots(k_tag, 4, row, x + h * stride, stride, d, to)
            elif some == 3:
                dots(k_tag, 3, row, x + h * stride, stride, d, to)
            elif some == 2:
                dots(k_tag, 2, row, x + h * stride, stride, d, to)
            else:
                dots(k_tag, 1, row, x + h * stride, stride, d, to)
            for i in range(some):
                scores[h + i, j - first] = room[i]
            h += some


@njit(**JIT)
def softmax(row, count, cap, slope, ago, mask, mask_bytes, mask_tag):
    """Turn a row of scores into weights relative to its peak; (peak, sum of weights). -inf where nothing is seen."""
    if cap > 0:
        for j in range(count):
            row[j] = cap * tanh(row[j] / cap)
    if slope != 0:
        for j in range(count):
            row[j] -= slope * nb.float32(ago - j)
    if mask:
        hide_or_add(row, count, mask, mask_tag)
    peak = HIDDEN
    for j in range(count):
        peak = max(peak, row[j])
    if peak == HIDDEN:
        row[:count] = 0
        return peak, nb.float32(0)
    total = nb.float32(0)
    for j in range(count):
        weight = exp(row[j] - peak)
        row[j] = weight
        total += weight
    return peak, total
