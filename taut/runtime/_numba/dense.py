"""The steps that know nothing of positions: norms, linear layers, sums."""

from __future__ import annotations

import math

import numba as nb

from taut.ops._numba.abreast import asks_ahead
from taut.ops._numba.formats import INT4_HALF, is_abreast, place_of, share_of
from taut.ops._numba.kernels import invoke, jit, kernel, record
from taut.ops._numba.nibbles import arrange
from taut.ops._numba.planes import COPIES, WIDE
from taut.ops._numba.products import activate
from taut.ops._numba.rows import AHEAD, ROWS
from taut.ops._numba.scalar import floats, span, tanh
from taut.ops._numba.simd import LANES
from taut.runtime._numba.table import CENTRED, PLAIN, STEP

BLOCK = 1024
"""Rows of a weight whose products a thread holds before it finishes them."""


@jit
def statistics(x, k, norm, eps):
    """(what is to be taken off x, what it is then to be multiplied by)"""
    mean, squares = nb.float32(0), nb.float32(0)
    if norm == PLAIN:
        return mean, nb.float32(1)
    if norm == CENTRED:
        for i in range(k):
            mean += x[i]
        mean /= nb.float32(k)
    for i in range(k):
        value = x[i] - mean
        squares += value * value
    return mean, nb.float32(1) / math.sqrt(squares / nb.float32(k) + nb.float32(eps))


@jit
def scaled(x, to, first, last, mean, alpha, gain, bias):
    """to = (x - mean) alpha gain + bias, for the features from first to last"""
    for i in range(first, last):
        to[i] = (x[i] - mean) * alpha
    if gain:
        gains = floats(gain, last)
        for i in range(first, last):
            to[i] *= gains[i]
    if bias:
        biases = floats(bias, last)
        for i in range(first, last):
            to[i] += biases[i]


@jit
def padded_to(k):
    return (k + WIDE - 1) // WIDE * WIDE


@jit
def room_for(k):
    """The floats of scratch that a row's input takes: gathered, arranged, and what its products are multiplied by."""
    return (1 + COPIES) * padded_to(k) + LANES


@jit
def gather(p, rows, scratch, padded):
    """Copy the normed input into scratch, padded with zeros; the divisions are put off and lie at what it gives.

    Behind the input lies the same arranged, where a weight is in int4.
    """
    k, behind = p.k, scratch + 4 * (1 + COPIES) * padded * rows
    factors = floats(behind, rows)
    for t in range(rows):
        x, to = floats(p.x + t * p.x_stride, k), floats(scratch + 4 * padded * t, padded)
        mean, alpha = statistics(x, k, p.norm, p.eps)
        now = alpha if p.norm_bias else nb.float32(1)
        scaled(x, to, 0, k, mean, now, p.gain, p.norm_bias)
        factors[t] = nb.float32(1) if p.norm_bias else alpha
        for i in range(k, padded):
            to[i] = 0
    if p.form >= INT4_HALF or p.form2 >= INT4_HALF:
        arrange(scratch, scratch + 4 * padded * rows, padded * rows)
    return behind


@jit
def seen_by(form, scratch, rows, padded):
    """(the gathered input as a format reads it, the bytes between its rows)"""
    if form >= INT4_HALF:
        return scratch + 4 * padded * rows, 4 * COPIES * padded
    return scratch, 4 * padded


@jit
def activated(row, act):
    """The activation of a whole row; one loop an activation, so that each is a loop of vectors."""
    if act == 1:
        for i in range(len(row)):
            row[i] = activate(row[i], 1)
    elif act == 2:
        for i in range(len(row)):
            row[i] = activate(row[i], 2)
    elif act == 3:
        for i in range(len(row)):
            row[i] = activate(row[i], 3)
    elif act:
        for i in range(len(row)):
            row[i] = activate(row[i], act)


@jit
def shifted(row, factor, bias, first):
    """row = row factor + bias"""
    for i in range(len(row)):
        row[i] *= factor
    if bias:
        biases = floats(bias + 4 * first, len(row))
        for i in range(len(row)):
            row[i] += biases[i]


@jit
def finished(p, row, t, first):
    """softcap(activation(row) scale) + residual, into the output"""
    activated(row, p.act)
    scale, cap = nb.float32(p.scale), nb.float32(p.cap)
    to = floats(p.out + t * p.out_stride + 4 * first, len(row))
    if cap > 0:
        for i in range(len(row)):
            to[i] = cap * tanh(row[i] * scale / cap)
    else:
        for i in range(len(row)):
            to[i] = row[i] * scale
    if p.residual:
        added = floats(p.residual + t * p.residual_stride + 4 * first, len(row))
        for i in range(len(row)):
            to[i] += added[i]


@jit
def rows_of(p, part, parts):
    """The half-open range of the rows of a step's weights that a thread multiplies."""
    return share_of(p.n, part, parts, LANES if is_abreast(p.form) or is_abreast(p.form2) else ROWS)


@jit
def beginning(p, part, parts):
    """Where a thread begins to read the weight of a step."""
    return place_of(p.form, p.w, p.k, rows_of(p, part, parts)[0])


@jit
def unasked(p, rows, part, parts):
    """Where the weight of a step begins that a thread will read and has not asked for yet."""
    asked = asks_ahead(rows) if is_abreast(p.form) else rows > 1 or p.form >= INT4_HALF
    return beginning(p, part, parts) + (AHEAD if asked else 0)


@kernel
def linear(step, _attention, rows, _tokens, _positions, _slots, scratch, part, parts, after):
    p = record(step, STEP)
    padded = padded_to(p.k)
    factors = floats(gather(p, rows, scratch, padded), rows)
    out = scratch + 4 * room_for(p.k) * rows
    x, stride = seen_by(p.form, scratch, rows, padded)
    begin, end = rows_of(p, part, parts)
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        on = place_of(p.form, p.w, p.k, last) if last < end else after
        invoke(p.products, (p.w, p.s, x, stride, rows, p.k, first, last, out, 4 * BLOCK, on))
        for t in range(rows):
            row = floats(out + 4 * BLOCK * t, last - first)
            shifted(row, factors[t], p.bias, first)
            finished(p, row, t, first)


@kernel
def glu(step, _attention, rows, _tokens, _positions, _slots, scratch, part, parts, after):
    p = record(step, STEP)
    padded = padded_to(p.k)
    factors = floats(gather(p, rows, scratch, padded), rows)
    gate = scratch + 4 * room_for(p.k) * rows
    up = gate + 4 * BLOCK * rows
    x, stride = seen_by(p.form, scratch, rows, padded)
    x2, stride2 = seen_by(p.form2, scratch, rows, padded)
    begin, end = rows_of(p, part, parts)
    for first in range(begin, end, BLOCK):
        last = min(first + BLOCK, end)
        other = place_of(p.form2, p.w2, p.k, first)
        on = place_of(p.form, p.w, p.k, last) if last < end else after
        invoke(p.products, (p.w, p.s, x, stride, rows, p.k, first, last, gate, 4 * BLOCK, other))
        invoke(p.products2, (p.w2, p.s2, x2, stride2, rows, p.k, first, last, up, 4 * BLOCK, on))
        for t in range(rows):
            a, b = floats(gate + 4 * BLOCK * t, last - first), floats(up + 4 * BLOCK * t, last - first)
            shifted(a, factors[t], p.bias, first)
            shifted(b, factors[t], p.bias2, first)
            activated(a, p.act)
            to = floats(p.out + t * p.out_stride + 4 * first, last - first)
            for i in range(last - first):
                to[i] = a[i] * b[i]


@kernel
def normalize(step, _attention, rows, _tokens, _positions, _slots, _scratch, part, parts, _after):
    p = record(step, STEP)
    first, last = span(p.k, part, parts)
    for t in range(rows):
        x, to = floats(p.x + t * p.x_stride, p.k), floats(p.out + t * p.out_stride, p.k)
        mean, alpha = statistics(x, p.k, p.norm, p.eps)
        scaled(x, to, first, last, mean, alpha, p.gain, p.norm_bias)
        if p.residual:
            added = floats(p.residual + t * p.residual_stride, p.k)
            for i in range(first, last):
                to[i] += added[i]


@kernel
def combine(step, _attention, rows, _tokens, _positions, _slots, _scratch, part, parts, _after):
    p = record(step, STEP)
    first, last = span(p.n, part, parts)
    scale, b_scale = nb.float32(p.scale), nb.float32(p.b_scale)
    for t in range(rows):
        a, to = floats(p.x + t * p.x_stride, p.n), floats(p.out + t * p.out_stride, p.n)
        b = floats(p.b + t * p.b_stride, p.n)
        if p.b and p.product:
            for i in range(first, last):
                to[i] = a[i] * scale * b[i]
        elif p.b:
            for i in range(first, last):
                to[i] = a[i] * scale + b[i] * b_scale
        else:
            for i in range(first, last):
                to[i] = a[i] * scale
