"""Norms, a row at a time: read from memory once, then from the nearest cache."""

from __future__ import annotations

import math

import numba as nb
from numba import njit

from taut.ops._numba.parallel import shared
from taut.ops._numba.scalar import JIT, array, down, span, up


@njit(**JIT)
def scaled(source, to, alpha, gain, d, y_tag, gain_tag):
    """to = source alpha gain"""
    if gain:
        gains = array(gain, d, gain_tag)
        for i in range(d):
            to[i] = down(up(source[i]) * alpha * up(gains[i]), y_tag)
    else:
        for i in range(d):
            to[i] = down(up(source[i]) * alpha, y_tag)


@njit(**JIT)
def inverse_rms(source, d, eps):
    squares = nb.float32(0)
    for i in range(d):
        value = up(source[i])
        squares += value * value
    return nb.float32(1) / math.sqrt(squares / nb.float32(d) + nb.float32(eps))


@njit(**JIT)
def rms_part(part, parts, x, gain, y, rows, d, eps, tag, gain_tag):
    source, to = array(x, (rows, d), tag), array(y, (rows, d), tag)
    first, last = span(rows, part, parts)
    for row in range(first, last):
        scaled(source[row], to[row], inverse_rms(source[row], d, eps), gain, d, tag, gain_tag)


share_rms = shared(rms_part)


@njit(**JIT)
def rms_norm(x, gain, y, rows, d, eps, parts, tag, gain_tag):
    share_rms(parts, (x, gain, y, rows, d, eps, tag, gain_tag))


@njit(**JIT)
def add_rms_part(part, parts, x, residual, gain, y, total, rows, d, eps, tag, gain_tag):
    xs, rs = array(x, (rows, d), tag), array(residual, (rows, d), tag)
    ys, sums = array(y, (rows, d), tag), array(total, (rows, d), tag)
    first, last = span(rows, part, parts)
    for row in range(first, last):
        a, b, c = xs[row], rs[row], sums[row]
        for i in range(d):
            c[i] = down(up(a[i]) + up(b[i]), tag)
        scaled(c, ys[row], inverse_rms(c, d, eps), gain, d, tag, gain_tag)


share_add_rms = shared(add_rms_part)


@njit(**JIT)
def add_rms_norm(x, residual, gain, y, total, rows, d, eps, parts, tag, gain_tag):
    share_add_rms(parts, (x, residual, gain, y, total, rows, d, eps, tag, gain_tag))


@njit(**JIT)
def layer_part(part, parts, x, gain, bias, y, rows, d, eps, tag, gain_tag, bias_tag):
    source, to = array(x, (rows, d), tag), array(y, (rows, d), tag)
    gains, biases = array(gain, d, gain_tag), array(bias, d, bias_tag)
    first, last = span(rows, part, parts)
    for row in range(first, last):
        a, b, total, squares = source[row], to[row], nb.float32(0), nb.float32(0)
        for i in range(d):
            total += up(a[i])
        mean = total / nb.float32(d)
        for i in range(d):
            value = up(a[i]) - mean
            squares += value * value
        alpha = nb.float32(1) / math.sqrt(squares / nb.float32(d) + nb.float32(eps))
        if gain and bias:
            for i in range(d):
                b[i] = down((up(a[i]) - mean) * alpha * up(gains[i]) + up(biases[i]), tag)
        elif gain:
            for i in range(d):
                b[i] = down((up(a[i]) - mean) * alpha * up(gains[i]), tag)
        elif bias:
            for i in range(d):
                b[i] = down((up(a[i]) - mean) * alpha + up(biases[i]), tag)
        else:
            for i in range(d):
                b[i] = down((up(a[i]) - mean) * alpha, tag)


share_layer = shared(layer_part)


@njit(**JIT)
def layer_norm(x, gain, bias, y, rows, d, eps, parts, tag, gain_tag, bias_tag):
    share_layer(parts, (x, gain, bias, y, rows, d, eps, tag, gain_tag, bias_tag))
