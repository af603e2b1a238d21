"""What the many rows of a prompt need beside products: heads turned, scores weighed, halves gated, codes widened."""

from __future__ import annotations

import numba as nb
import numpy as np

from taut.ops._numba.decode import adjust, weigh
from taut.ops._numba.kernels import jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.scalar import array, exp, floats, span, up
from taut.runtime._numba.dense import activated


@jit
def turned_part(part, parts, x, stride, rows, heads, d, cos, sin, half, interleaved, positions, to):
    """to[t, h] = x[t, h] turned by the angles of position t."""
    begin, end = span(rows, part, parts)
    for t in range(begin, end):
        c, s = floats(cos + 4 * positions[t] * half, half), floats(sin + 4 * positions[t] * half, half)
        for h in range(heads):
            head, out = floats(x + t * stride + 4 * h * d, d), floats(to + 4 * (t * heads + h) * d, d)
            if interleaved:
                for i in range(half):
                    out[2 * i] = head[2 * i] * c[i] - head[2 * i + 1] * s[i]
                    out[2 * i + 1] = head[2 * i + 1] * c[i] + head[2 * i] * s[i]
            else:
                for i in range(half):
                    out[i] = head[i] * c[i] - head[i + half] * s[i]
                    out[i + half] = head[i + half] * c[i] + head[i] * s[i]
            for i in range(2 * half, d):
                out[i] = head[i]


share_turned = shared(turned_part)


@jit
def turned(x, stride, rows, heads, d, cos, sin, half, interleaved, positions, to, parts):
    share_turned(parts, (x, stride, rows, heads, d, cos, sin, half, interleaved, positions, to))


@jit
def weights_part(part, parts, scores, rows, keys, start, first, last, scale, cap, alibi, sinks):
    """The softmax over the keys from first[t] to last[t] of every head's row t; a row's first score is key `start`."""
    heads = len(scores) // rows
    begin, end = span(len(scores), part, parts)
    for row in range(begin, end):
        h, t = row // rows, row % rows
        low, high, whole = first[t] - start, last[t] + 1 - start, scores[row]
        seen = whole[low:high]
        for i in range(len(seen)):
            seen[i] *= nb.float32(scale)
        slope = floats(alibi, heads)[h] if alibi else nb.float32(0)
        adjust(seen, 0, last[t] - first[t], nb.float32(cap), slope, 0, False, np.uint8(0))
        top, total = weigh(seen)
        if sinks:
            total += exp(floats(sinks, heads)[h] - top)
        share = nb.float32(1) / total
        for i in range(low):
            whole[i] = 0
        for i in range(len(seen)):
            seen[i] *= share
        for i in range(high, keys):
            whole[i] = 0


share_weights = shared(weights_part)


@jit
def weights(scores, heads, rows, keys, start, first, last, scale, cap, alibi, sinks, parts):
    table = array(scores, (heads * rows, keys), np.float32(0))
    share_weights(parts, (table, rows, keys, start, first, last, scale, cap, alibi, sinks))


@jit
def gated_part(part, parts, gate, up_, to, rows, d, act, gate_tag, up_tag):
    begin, end = span(rows, part, parts)
    gates, ups, out = (
        array(gate, (rows, d), gate_tag),
        array(up_, (rows, d), up_tag),
        array(to, (rows, d), np.float32(0)),
    )
    for t in range(begin, end):
        a, b, row = gates[t], ups[t], out[t]
        for i in range(d):
            row[i] = up(a[i])
        activated(row, act)
        for i in range(d):
            row[i] *= up(b[i])


share_gated = shared(gated_part)


@jit
def gated(gate, up_, to, rows, d, act, parts, gate_tag, up_tag):
    """to = activation(gate) up"""
    share_gated(parts, (gate, up_, to, rows, d, act, gate_tag, up_tag))


@jit
def grouped_part(part, parts, codes, scales, groups, to, tag):
    begin, end = span(groups, part, parts)
    for g in range(begin, end):
        bytes_, out = array(codes + 16 * g, 16, np.uint8(0)), floats(to + 128 * g, 32)
        scale = up(array(scales, g + 1, tag)[g])
        for i in range(16):
            out[i] = nb.float32(nb.int32(bytes_[i] & 15) - 8) * scale
        for i in range(16):
            out[i + 16] = nb.float32(nb.int32(bytes_[i] >> 4) - 8) * scale


share_grouped = shared(grouped_part)


@jit
def grouped(codes, scales, groups, to, parts, tag):
    """float32 of int4 codes in groups of 32."""
    share_grouped(parts, (codes, scales, groups, to, tag))
