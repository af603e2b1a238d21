"""Kernels over the raw bits of float16, bfloat16, float32 and float64 rows.

All work on integers (uint16, uint32, uint64), release the GIL, and take a format as (mantissa bits, exponent bits).
`scale` multiplies by a vector in float64 and rounds once. `check` decides by another road whether a written value is
that product rounded: it asks on which side of the two neighbouring midpoints the product lies.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_INFINITY = 0x7FF << 52


@njit(inline="always")
def _float(bits):
    return np.int64(bits).view(np.float64)


@njit(inline="always")
def _bits(value):
    return np.float64(value).view(np.int64)


@njit(inline="always")
def _decode(magnitude, mantissa, exponent):
    """The float64 value of a magnitude's bits. The bits of infinity read as 2 to the power of the largest exponent."""
    bias = (1 << (exponent - 1)) - 1
    normal = _float((magnitude << (52 - mantissa)) + ((1023 - bias) << 52))
    unit = _float((1024 - bias - mantissa) << 52)
    return normal if magnitude >= (np.int64(1) << mantissa) else np.float64(magnitude) * unit


@njit(inline="always")
def _encode(value, mantissa, exponent):
    """The bits of a float64 value's magnitude, rounded once, to nearest, ties to even."""
    bias = (1 << (exponent - 1)) - 1
    infinity = ((np.int64(1) << exponent) - 1) << mantissa
    bits = _bits(abs(value))
    shift = 52 - mantissa
    nearest = (bits + ((np.int64(1) << (shift - 1)) - 1) + ((bits >> shift) & 1)) >> shift
    normal = min(nearest - ((1023 - bias) << mantissa), infinity)
    anchor = np.int64((1023 + 53 - bias - mantissa) << 52)
    subnormal = _bits(abs(value) + _float(anchor)) - anchor
    rounded = normal if bits >= (np.int64(1024 - bias) << 52) else subnormal
    return rounded if bits <= _INFINITY else infinity | (np.int64(1) << (mantissa - 1))


@njit(inline="always")
def _product(bits, factor, mantissa, exponent):
    """A stored value times a float64 factor."""
    infinity = ((np.int64(1) << exponent) - 1) << mantissa
    magnitude = bits & ((np.int64(1) << (mantissa + exponent)) - 1)
    value = _decode(magnitude, mantissa, exponent)
    value = value if magnitude < infinity else _float(_INFINITY | (magnitude << (52 - mantissa)))
    return -value * factor if bits >> (mantissa + exponent) else value * factor


@njit(inline="always")
def _sign(value):
    return np.int64(_bits(value) < 0)


@njit(inline="always")
def _scale_one(bits, factor, mantissa, exponent):
    """The rounded product, and whether it overflowed or underflowed."""
    infinity = ((np.int64(1) << exponent) - 1) << mantissa
    least = np.int64(1) << mantissa
    product = _product(bits, factor, mantissa, exponent)
    rounded = _encode(product, mantissa, exponent)
    source = bits & ((np.int64(1) << (mantissa + exponent)) - 1)
    over = np.int64((rounded == infinity) & (abs(product) < np.inf))
    under = np.int64((rounded < least) & (source >= least) & (product != 0))
    sign = _sign(product) if rounded <= infinity else np.int64(0)
    return rounded | (sign << (mantissa + exponent)), over, under


@njit(nogil=True, cache=True)
def scale(source, factors, first, inner, target, mantissa, exponent):
    """target = source * factors, rounded once; returns how many overflowed and underflowed.

    source, target: flat unsigned integers holding the bits. Element i is multiplied by
    factors[(first + i) // inner % len(factors)].
    """
    over, under, done = 0, 0, 0
    while done < source.size:
        at = first + done
        column, rest = at // inner % factors.size, inner - at % inner
        size = min(source.size - done, factors.size - column if inner == 1 else rest)
        src, out = source[done : done + size], target[done : done + size]
        if inner == 1:
            by = factors[column : column + size]
            for i in range(size):
                bits, o, u = _scale_one(np.int64(src[i]), by[i], mantissa, exponent)
                out[i] = bits
                over += o
                under += u
        else:
            factor = factors[column]
            for i in range(size):
                bits, o, u = _scale_one(np.int64(src[i]), factor, mantissa, exponent)
                out[i] = bits
                over += o
                under += u
        done += size
    return over, under


@njit(inline="always")
def _is_nearest(bits, written, factor, mantissa, exponent):
    """Whether the written bits are the rounded product: it lies between their midpoints, on one only where even."""
    infinity = ((np.int64(1) << exponent) - 1) << mantissa
    product = _product(bits, factor, mantissa, exponent)
    magnitude = written & ((np.int64(1) << (mantissa + exponent)) - 1)
    here = _decode(magnitude, mantissa, exponent)
    below = 0.5 * (here + _decode(max(magnitude - 1, 0), mantissa, exponent))
    above = 0.5 * (here + _decode(magnitude + 1, mantissa, exponent))
    size, even = abs(product), magnitude & 1 == 0
    high = (size > below) | (even & (size == below))
    low = (magnitude >= infinity) | (size < above) | (even & (size == above))
    return high & low & (magnitude <= infinity) & (written >> (mantissa + exponent) == _sign(product))


@njit(nogil=True, cache=True)
def check(source, factors, first, inner, written, mantissa, exponent):
    """How many written values are not source * factors rounded once; the arguments are those of `scale`.

    A product that is not a number always counts: it is never written.
    """
    wrong, done = 0, 0
    while done < source.size:
        at = first + done
        column, rest = at // inner % factors.size, inner - at % inner
        size = min(source.size - done, factors.size - column if inner == 1 else rest)
        src, out = source[done : done + size], written[done : done + size]
        if inner == 1:
            by = factors[column : column + size]
            for i in range(size):
                wrong += not _is_nearest(np.int64(src[i]), np.int64(out[i]), by[i], mantissa, exponent)
        else:
            factor = factors[column]
            for i in range(size):
                wrong += not _is_nearest(np.int64(src[i]), np.int64(out[i]), factor, mantissa, exponent)
        done += size
    return wrong


@njit(nogil=True, cache=True)
def count_nonfinite(bits, infinity):
    """How many of the values are infinite or not a number."""
    count = 0
    for i in range(bits.size):
        count += (bits[i] & infinity) == infinity
    return count


@njit(nogil=True, cache=True)
def count_different(a, b):
    """How many elements of two integer arrays of one length differ."""
    count = 0
    for i in range(a.size):
        count += a[i] != b[i]
    return count
