"""Norms, a row at a time: read from memory once, then from the nearest cache, while a later row is asked for."""

from __future__ import annotations

import math
from typing import Any

import numba as nb
from llvmlite import ir
from numba import types

from taut.ops._numba.kernels import jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.rows import LINE, fetch, prefetch
from taut.ops._numba.scalar import EXACT, array, down, intrinsic, narrow, span, up
from taut.ops._numba.simd import BITS, FUSE, LANES, WORD, at, broadcast, load, upto

SOON = 8192
"""Bytes ahead that memory is asked for at the least: a short row is done before the next one has come."""
START, NEAR = 64, nb.float32(0.25)
"""How many values' mean squares are summed about, and the variances that the square of its distance from the row's own
may be: further off, digits are lost."""


@intrinsic(prefer_literal=True)
def affine(_typing, tag, gain_tag, bias_tag, gained, biased, x, gain, bias, y, d, mean, alpha, ahead):
    """y = (x - mean) alpha gain + bias for d values at addresses; constants say whether there is a gain or a bias.

    Asks meanwhile for as much memory from `ahead` on as it reads of x.
    """
    kind, gain_kind, bias_kind = (types.unliteral(t) for t in (tag, gain_tag, bias_tag))
    has_gain, has_bias, size = gained.literal_value, biased.literal_value, BITS[kind] // 8
    in_line = LINE // size

    def generate(context, builder, _signature, args):
        *_, x, gain, bias, y, d, mean, alpha, ahead = args
        wide = broadcast(builder, mean), broadcast(builder, alpha)

        def block(start: Any, count: int, mean: Any, alpha: Any) -> None:
            value = builder.fsub(load(builder, at(builder, x, (start, size)), kind, count), mean, flags=EXACT)
            value = builder.fmul(value, alpha, flags=EXACT)
            if has_gain:
                gains = load(builder, at(builder, gain, (start, BITS[gain_kind] // 8)), gain_kind, count)
                value = builder.fmul(value, gains, flags=FUSE)
            if has_bias:
                biases = load(builder, at(builder, bias, (start, BITS[bias_kind] // 8)), bias_kind, count)
                value = builder.fadd(value, biases, flags=FUSE)
            stored = narrow(builder, value, kind)
            place = builder.inttoptr(at(builder, y, (start, size)), stored.type.as_pointer())
            builder.store(stored, place, align=size)

        lines = builder.sdiv(d, ir.Constant(WORD, in_line))
        with upto(builder, ir.Constant(WORD, 0), lines) as loop:
            prefetch(builder, at(builder, ahead, (loop.index, LINE)), 1)
            for step in range(0, in_line, LANES):
                block(at(builder, ir.Constant(WORD, step), (loop.index, in_line)), LANES, *wide)
        with upto(builder, builder.mul(lines, ir.Constant(WORD, in_line)), d) as loop:
            block(loop.index, 1, mean, alpha)
        return context.get_dummy_value()

    ints, floats = [types.int64] * 5, [types.float32] * 2
    return types.void(tag, gain_tag, bias_tag, gained, biased, *ints, *floats, types.int64), generate


@jit
def moved(x, gain, bias, y, d, mean, alpha, ahead, tag, gain_tag, bias_tag):
    """y = (x - mean) alpha gain + bias, where there are any, while the memory at `ahead` is asked for."""
    if gain and bias:
        affine(tag, gain_tag, bias_tag, 1, 1, x, gain, bias, y, d, mean, alpha, ahead)
    elif gain:
        affine(tag, gain_tag, bias_tag, 1, 0, x, gain, bias, y, d, mean, alpha, ahead)
    elif bias:
        affine(tag, gain_tag, bias_tag, 0, 1, x, gain, bias, y, d, mean, alpha, ahead)
    else:
        affine(tag, gain_tag, bias_tag, 0, 0, x, gain, bias, y, d, mean, alpha, ahead)


@jit
def begin(x, rows, size, part, parts):
    """The half-open range of a part's rows, of which the first are asked for."""
    first, last = span(rows, part, parts)
    fetch(x + first * size, min(SOON, (last - first) * size))
    return first, last


@jit
def later(row, size, last, far):
    """Where to ask for memory meanwhile, in bytes: `far` beyond the row's start, but not beyond the last row's."""
    return min(row * size + far, (last - 1) * size)


@jit
def inverse_rms(source, d, eps):
    squares = nb.float32(0)
    for i in range(d):
        value = up(source[i])
        squares += value * value
    return nb.float32(1) / math.sqrt(squares / nb.float32(d) + nb.float32(eps))


@jit
def rms_part(part, parts, x, gain, y, rows, d, eps, tag, gain_tag):
    source, none = array(x, (rows, d), tag), nb.float32(0)
    size = d * source.itemsize
    first, last = begin(x, rows, size, part, parts)
    for row in range(first, last):
        at_row, ahead = x + row * size, x + later(row, size, last, max(size, SOON))
        alpha = inverse_rms(source[row], d, eps)
        moved(at_row, gain, 0, y + row * size, d, none, alpha, ahead, tag, gain_tag, gain_tag)


share_rms = shared(rms_part)


@jit
def rms_norm(tag, gain_tag, x, gain, y, rows, d, parts, eps):
    share_rms(parts, (x, gain, y, rows, d, eps, tag, gain_tag))


@jit
def add_rms_part(part, parts, x, residual, gain, y, total, rows, d, eps, tag, gain_tag):
    xs, rs, sums = array(x, (rows, d), tag), array(residual, (rows, d), tag), array(total, (rows, d), tag)
    size, none = d * xs.itemsize, nb.float32(0)
    first, last = begin(x, rows, size, part, parts)
    for row in range(first, last):
        a, b, c = xs[row], rs[row], sums[row]
        for i in range(d):
            c[i] = down(up(a[i]) + up(b[i]), tag)
        ahead = x + later(row, size, last, max(size, SOON))
        moved(
            total + row * size, gain, 0, y + row * size, d, none, inverse_rms(c, d, eps), ahead, tag, gain_tag, gain_tag
        )


share_add_rms = shared(add_rms_part)


@jit
def add_rms_norm(tag, gain_tag, x, residual, gain, y, total, rows, d, parts, eps):
    share_add_rms(parts, (x, residual, gain, y, total, rows, d, eps, tag, gain_tag))


@jit
def sums_about(a, d, centre):
    """The sums of a row's distances from a number and of their squares."""
    total, squares = nb.float32(0), nb.float32(0)
    for i in range(d):
        value = up(a[i]) - centre
        total += value
        squares += value * value
    return total, squares


@jit
def mean_of(a, d):
    total = nb.float32(0)
    for i in range(d):
        total += up(a[i])
    return total / nb.float32(d)


@jit
def moments(a, d):
    """Mean and biased variance, in one pass about the mean of the row's start unless that lies far from its own."""
    centre = mean_of(a, min(d, START))
    total, squares = sums_about(a, d, centre)
    off = total / nb.float32(d)
    mean, variance = centre + off, squares / nb.float32(d) - off * off
    if not off * off <= NEAR * variance:
        mean = mean_of(a, d)
        variance = sums_about(a, d, mean)[1] / nb.float32(d)
    return mean, variance


@jit
def layer_part(part, parts, x, gain, bias, y, rows, d, eps, tag, gain_tag, bias_tag):
    source = array(x, (rows, d), tag)
    size = d * source.itemsize
    far = SOON if source.itemsize == 4 else max(size, SOON)  # the processor itself follows float32 read in order
    first, last = begin(x, rows, size, part, parts)
    for row in range(first, last):
        mean, variance = moments(source[row], d)
        alpha = nb.float32(1) / math.sqrt(variance + nb.float32(eps))
        ahead = x + later(row, size, last, far)
        moved(x + row * size, gain, bias, y + row * size, d, mean, alpha, ahead, tag, gain_tag, bias_tag)


share_layer = shared(layer_part)


@jit
def layer_norm(tag, gain_tag, bias_tag, x, gain, bias, y, rows, d, parts, eps):
    share_layer(parts, (x, gain, bias, y, rows, d, eps, tag, gain_tag, bias_tag))
