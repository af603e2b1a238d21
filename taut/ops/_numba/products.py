"""Products of up to 16 tokens with a weight, bound by reading the weight once."""

from __future__ import annotations

import math

import numba as nb
import numpy as np
from numba import njit

from taut.ops._numba.parallel import shared
from taut.ops._numba.scalar import JIT, array, down, exp, overload, span, tanh, up
from taut.ops._numba.simd import dots, dots_int4

ACTS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")


@njit(**JIT)
def activate(x, act):
    """The activation of an index into ACTS."""
    one = nb.float32(1)
    if act == 1:
        return x / (one + exp(-x))
    if act == 2:
        return nb.float32(0.5) * x * (one + nb.float32(math.erf(x * nb.float32(0.7071067811865476))))
    if act == 3:
        inner = nb.float32(0.7978845608028654) * (x + nb.float32(0.044715) * x * x * x)
        return nb.float32(0.5) * x * (one + tanh(inner))
    if act == 4:
        return max(x, nb.float32(0))
    if act == 5:
        return max(x, nb.float32(0)) * max(x, nb.float32(0))
    if act == 6:
        return one / (one + exp(-x))
    if act == 7:
        return tanh(x)
    return x


@njit(**JIT)
def gather(x, gain, norm, eps, tokens, k, x_tag, gain_tag):
    """(x gain in float32 (tokens, k), the scalar that each token's products are still to be multiplied by)."""
    h, alpha = np.empty((tokens, k), np.float32), np.ones(tokens, np.float32)
    stored, gains = array(x, (tokens, k), x_tag), array(gain, k, gain_tag)
    for t in range(tokens):
        row, source, squares = h[t], stored[t], nb.float32(0)
        for i in range(k):
            value = up(source[i])
            row[i] = value
            squares += value * value
        if norm:
            alpha[t] = nb.float32(1) / math.sqrt(squares / nb.float32(k) + nb.float32(eps))
        if gain:
            for i in range(k):
                row[i] *= up(gains[i])
    return h, alpha


def row_dots(weight, scale, row, x, tokens, k, out, w_tag, s_tag):
    """out[t] = (dequantized row of the weight) . x[t]; behind out there is room for k / 32 more float32.

    Works on addresses, since passing arrays counts references.
    """


@overload(row_dots, inline="always", jit_options=JIT)
def _(weight, scale, row, x, tokens, k, out, w_tag, s_tag):
    if w_tag == nb.uint8:
        return _row_dots_int4
    return _row_dots_int8 if w_tag == nb.int8 else _row_dots_float


def _row_dots_float(weight, scale, row, x, tokens, k, out, w_tag, s_tag):
    each_dot(weight + row * k * array(weight, 1, w_tag).itemsize, x, tokens, k, out, w_tag)


def _row_dots_int8(weight, scale, row, x, tokens, k, out, w_tag, s_tag):
    each_dot(weight + row * k, x, tokens, k, out, w_tag)
    factor, products = up(array(scale, row + 1, s_tag)[row]), array(out, tokens, np.float32(0))
    for t in range(tokens):
        products[t] *= factor


def _row_dots_int4(weight, scale, row, x, tokens, k, out, w_tag, s_tag):
    groups = k // 32
    scales = array(scale + row * groups * array(scale, 1, s_tag).itemsize, groups, s_tag)
    room = array(out + 4 * tokens, groups, np.float32(0))
    for g in range(groups):
        room[g] = up(scales[g])
    each_dot_int4(weight + row * (k // 2), out + 4 * tokens, x, tokens, groups, out)


@njit(**JIT)
def each_dot(row, x, tokens, k, out, w_tag):
    stride, t = 4 * k, 0
    while t + 4 <= tokens:
        dots(w_tag, 4, row, x + t * stride, stride, k, out + 4 * t)
        t += 4
    if tokens - t == 3:
        dots(w_tag, 3, row, x + t * stride, stride, k, out + 4 * t)
    elif tokens - t == 2:
        dots(w_tag, 2, row, x + t * stride, stride, k, out + 4 * t)
    elif tokens - t == 1:
        dots(w_tag, 1, row, x + t * stride, stride, k, out + 4 * t)


@njit(**JIT)
def each_dot_int4(row, scales, x, tokens, groups, out):
    stride, t = 128 * groups, 0
    while t + 4 <= tokens:
        dots_int4(4, row, scales, x + t * stride, stride, groups, out + 4 * t)
        t += 4
    while t < tokens:
        dots_int4(1, row, scales, x + t * stride, stride, groups, out + 4 * t)
        t += 1


@njit(**JIT)
def linear_part(part, parts, h, alpha, w, s, bias, residual, y, n, w_tag, s_tag, b_tag, y_tag):
    """The part-th share of the rows of y = alpha (w h) + bias + residual."""
    tokens, k = h.shape
    products = np.empty(tokens + k // 32, np.float32)
    x, out = h.ctypes.data, products.ctypes.data
    written, added, biases = array(y, (tokens, n), y_tag), array(residual, (tokens, n), y_tag), array(bias, n, b_tag)
    first, last = span(n, part, parts)
    for row in range(first, last):
        row_dots(w, s, row, x, tokens, k, out, w_tag, s_tag)
        for t in range(tokens):
            value = products[t] * alpha[t]
            if bias:
                value += up(biases[row])
            if residual:
                value += up(added[t, row])
            written[t, row] = down(value, y_tag)


share_linear = shared(linear_part)


@njit(**JIT)
def linear(
    x, w, s, gain, bias, residual, y, squares, tokens, k, n, norm, eps, parts, x_tag, w_tag, s_tag, g_tag, b_tag
):
    """y = norm?(x) w^T + bias + residual, and the sums of squares of y's rows where `squares` is an address."""
    h, alpha = gather(x, gain, norm, eps, tokens, k, x_tag, g_tag)
    share_linear(parts, (h, alpha, w, s, bias, residual, y, n, w_tag, s_tag, b_tag, x_tag))
    if squares:
        written, sums = array(y, (tokens, n), x_tag), array(squares, tokens, np.float32(0))
        for t in range(tokens):
            total, row = nb.float32(0), written[t]
            for i in range(n):
                total += up(row[i]) * up(row[i])
            sums[t] = total


@njit(**JIT)
def glu_part(part, parts, h, alpha, gate, gate_s, up_, up_s, y, n, act, w_tag, s_tag, y_tag):
    """The part-th share of the rows of y = act(alpha (gate h)) * alpha (up h)."""
    tokens, k = h.shape
    products = np.empty(2 * tokens + k // 32, np.float32)
    x, g, u = h.ctypes.data, products.ctypes.data, products.ctypes.data + 4 * tokens
    written = array(y, (tokens, n), y_tag)
    first, last = span(n, part, parts)
    for row in range(first, last):
        row_dots(gate, gate_s, row, x, tokens, k, g, w_tag, s_tag)
        row_dots(up_, up_s, row, x, tokens, k, u, w_tag, s_tag)
        for t in range(tokens):
            value = activate(products[t] * alpha[t], act) * (products[tokens + t] * alpha[t])
            written[t, row] = down(value, y_tag)


share_glu = shared(glu_part)


@njit(**JIT)
def norm_glu(x, gate, gate_s, up_, up_s, gain, y, tokens, k, n, eps, act, parts, x_tag, w_tag, s_tag, g_tag):
    """y = act(h gate^T) * (h up^T) with h = rms_norm(x, gain, eps)."""
    h, alpha = gather(x, gain, True, eps, tokens, k, x_tag, g_tag)
    share_glu(parts, (h, alpha, gate, gate_s, up_, up_s, y, n, act, w_tag, s_tag, x_tag))
