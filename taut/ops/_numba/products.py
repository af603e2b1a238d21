"""Products of up to 16 tokens with a weight, bound by reading the weight once."""

from __future__ import annotations

import math

import numba as nb
import numpy as np

from taut.ops._numba.formats import share_of
from taut.ops._numba.kernels import allocating, jit
from taut.ops._numba.nibbles import arrange, grouped
from taut.ops._numba.parallel import shared
from taut.ops._numba.planes import COPIES, WIDE
from taut.ops._numba.rows import dense
from taut.ops._numba.scalar import JIT, array, down, exp, overload, tanh, up

ACTS = ("identity", "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh")
BLOCK = 64
"""Rows of a weight whose products a thread holds before it finishes them."""


@jit
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


@allocating
def gather(x, gain, norm, eps, tokens, k, x_tag, gain_tag):
    """(x gain in float32, the scalar that each token's products are still to be multiplied by).

    The rows are padded to a multiple of WIDE with zeros.
    """
    h, alpha = np.empty((tokens, (k + WIDE - 1) // WIDE * WIDE), np.float32), np.ones(tokens, np.float32)
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
        row[k:] = 0
    return h, alpha


def ordered(h, w_tag):
    """Padded rows in the order in which a weight's format reads them."""


@overload(ordered, inline="always", jit_options=JIT)
def _(h, w_tag):
    return _arranged if w_tag == nb.uint8 else lambda h, w_tag: h


def _arranged(h, w_tag):
    to = np.empty((h.shape[0], COPIES * h.shape[1]), np.float32)
    arrange(h.ctypes.data, to.ctypes.data, h.size)
    return to


def weigh(w, s, x, x_stride, tokens, k, first, last, out, w_tag, s_tag):
    """out[t, row - first] = (dequantized row of the weight) . x[t], with BLOCK float32 to a row of out.

    x is float32, its rows `ordered`. Works on addresses, since passing arrays counts
    references.
    """


@overload(weigh, inline="always", jit_options=JIT)
def _(w, s, x, x_stride, tokens, k, first, last, out, w_tag, s_tag):
    if w_tag == nb.uint8:
        return _weigh_int4
    return _weigh_int8 if w_tag == nb.int8 else _weigh_float


def _weigh_float(w, s, x, x_stride, tokens, k, first, last, out, w_tag, s_tag):
    after = w + last * k * array(w, 1, w_tag).itemsize
    dense(w, x, x_stride, tokens, k, first, last, out, 4 * BLOCK, after, w_tag)


def _weigh_int8(w, s, x, x_stride, tokens, k, first, last, out, w_tag, s_tag):
    dense(w, x, x_stride, tokens, k, first, last, out, 4 * BLOCK, w + last * k, w_tag)
    scales, sums = array(s, last, s_tag), array(out, (tokens, BLOCK), np.float32(0))
    for t in range(tokens):
        for i in range(last - first):
            sums[t, i] *= up(scales[first + i])


def _weigh_int4(w, s, x, x_stride, tokens, k, first, last, out, w_tag, s_tag):
    grouped(w, s, x, x_stride, tokens, k, first, last, out, 4 * BLOCK, w + last * (k // 2), s_tag)


@allocating
def linear_part(part, parts, h, k, alpha, w, s, bias, residual, y, n, w_tag, s_tag, b_tag, y_tag):
    """The part-th share of the rows of y = alpha (w h) + bias + residual."""
    tokens, stride = len(alpha), 4 * h.shape[1]
    sums = np.empty((tokens, BLOCK), np.float32)
    written, added, biases = array(y, (tokens, n), y_tag), array(residual, (tokens, n), y_tag), array(bias, n, b_tag)
    first, last = share_of(n, part, parts)
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        weigh(w, s, h.ctypes.data, stride, tokens, k, start, stop, sums.ctypes.data, w_tag, s_tag)
        for t in range(tokens):
            for row in range(start, stop):
                value = sums[t, row - start] * alpha[t]
                if bias:
                    value += up(biases[row])
                if residual:
                    value += up(added[t, row])
                written[t, row] = down(value, y_tag)


share_linear = shared(linear_part)


@allocating
def linear(
    x, w, s, gain, bias, residual, y, squares, tokens, k, n, norm, eps, parts, x_tag, w_tag, s_tag, g_tag, b_tag
):
    """y = norm?(x) w^T + bias + residual, and the sums of squares of y's rows where `squares` is an address."""
    h, alpha = gather(x, gain, norm, eps, tokens, k, x_tag, g_tag)
    h = ordered(h, w_tag)
    share_linear(parts, (h, k, alpha, w, s, bias, residual, y, n, w_tag, s_tag, b_tag, x_tag))
    if squares:
        written, sums = array(y, (tokens, n), x_tag), array(squares, tokens, np.float32(0))
        for t in range(tokens):
            total, row = nb.float32(0), written[t]
            for i in range(n):
                total += up(row[i]) * up(row[i])
            sums[t] = total


@allocating
def glu_part(part, parts, h, k, alpha, gate, gate_s, up_, up_s, y, n, act, w_tag, s_tag, y_tag):
    """The part-th share of the rows of y = act(alpha (gate h)) * alpha (up h)."""
    tokens, x, stride = len(alpha), h.ctypes.data, 4 * h.shape[1]
    gates, ups = np.empty((tokens, BLOCK), np.float32), np.empty((tokens, BLOCK), np.float32)
    written = array(y, (tokens, n), y_tag)
    first, last = share_of(n, part, parts)
    for start in range(first, last, BLOCK):
        stop = min(start + BLOCK, last)
        weigh(gate, gate_s, x, stride, tokens, k, start, stop, gates.ctypes.data, w_tag, s_tag)
        weigh(up_, up_s, x, stride, tokens, k, start, stop, ups.ctypes.data, w_tag, s_tag)
        for t in range(tokens):
            for row in range(start, stop):
                at = row - start
                written[t, row] = down(activate(gates[t, at] * alpha[t], act) * (ups[t, at] * alpha[t]), y_tag)


share_glu = shared(glu_part)


@allocating
def norm_glu(x, gate, gate_s, up_, up_s, gain, y, tokens, k, n, eps, act, parts, x_tag, w_tag, s_tag, g_tag):
    """y = act(h gate^T) * (h up^T) with h = rms_norm(x, gain, eps)."""
    h, alpha = gather(x, gain, True, eps, tokens, k, x_tag, g_tag)
    h = ordered(h, w_tag)
    share_glu(parts, (h, k, alpha, gate, gate_s, up_, up_s, y, n, act, w_tag, s_tag, x_tag))
