"""Kernels over the raw bits of float16, bfloat16, float32 and float64 rows.

All work on integers (uint16, uint32, uint64), release the GIL, and take a format as (mantissa bits, exponent bits).
`scale` multiplies by a vector in float64 and rounds once. `check` decides by another road whether a written value is
that product rounded: it rounds nothing, and asks whether the product lies between the two neighbouring midpoints. Both
go by chunks, on a short road where all numbers in a chunk are normal and else on the long one.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_INFINITY = 0x7FF << 52
_LARGEST = (1 << 63) - 1
CHUNK = 4096


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
def _fill(factors, first, inner, by):
    """by[i] = factors[(first + i) // inner % len(factors)]"""
    done = 0
    while done < by.size:
        at = first + done
        column, rest = at // inner % factors.size, inner - at % inner
        if inner == 1:
            size = min(by.size - done, factors.size - column)
            by[done : done + size] = factors[column : column + size]
        else:
            size = min(by.size - done, rest)
            by[done : done + size] = factors[column]
        done += size


@njit(nogil=True, cache=True)
def _scale_normal(source, by, target, mantissa, exponent):
    """target = source * by where all are normal numbers; returns whether they are."""
    infinity, least = ((np.int64(1) << exponent) - 1) << mantissa, np.int64(1) << mantissa
    shift, top = 52 - mantissa, mantissa + exponent
    rebias = np.int64(1024 - (1 << (exponent - 1))) << 52
    half = (np.int64(1) << (shift - 1)) - 1
    low, high = least, least
    for i in range(source.size):
        bits = np.int64(source[i])
        magnitude = bits & ((np.int64(1) << top) - 1)
        product = _bits(_float((magnitude << shift) + rebias) * by[i])
        exact = product & _LARGEST
        rounded = (exact - rebias + half + ((exact >> shift) & 1)) >> shift
        low, high = min(low, min(magnitude, rounded)), max(high, max(magnitude, rounded))
        target[i] = rounded | (((product < 0) ^ (bits >> top)) << top)
    return low >= least and high < infinity


@njit(nogil=True, cache=True)
def _scale_any(source, by, target, mantissa, exponent):
    over, under = 0, 0
    for i in range(source.size):
        bits, o, u = _scale_one(np.int64(source[i]), by[i], mantissa, exponent)
        target[i] = bits
        over += o
        under += u
    return over, under


@njit(nogil=True, cache=True)
def scale(source, factors, first, inner, target, mantissa, exponent):
    """target = source * factors, rounded once; returns how many overflowed and underflowed.

    source, target: flat unsigned integers holding the bits. Element i is multiplied by
    factors[(first + i) // inner % len(factors)].
    """
    over, under, factor = 0, 0, np.empty(CHUNK)
    for start in range(0, source.size, CHUNK):
        src, out = source[start : start + CHUNK], target[start : start + CHUNK]
        by = factor[: src.size]
        _fill(factors, first + start, inner, by)
        if not _scale_normal(src, by, out, mantissa, exponent):
            o, u = _scale_any(src, by, out, mantissa, exponent)
            over += o
            under += u
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
def _wrong_normal(source, by, written, mantissa, exponent):
    """How many written values are farther than half a step from source * by, or are not normal numbers.

    The bits of neighbouring float64 magnitudes are neighbouring integers, so distances are differences of bits.
    """
    infinity, least = ((np.int64(1) << exponent) - 1) << mantissa, np.int64(1) << mantissa
    shift, top = 52 - mantissa, mantissa + exponent
    rebias = np.int64(1024 - (1 << (exponent - 1))) << 52
    half, mask = np.int64(1) << (shift - 1), (np.int64(1) << top) - 1
    wrong = 0
    for i in range(source.size):
        bits, out = np.int64(source[i]), np.int64(written[i])
        magnitude, size = bits & mask, out & mask
        product = _bits(_float((magnitude << shift) + rebias) * by[i])
        distance = abs((product & _LARGEST) - ((size << shift) + rebias))
        near = distance + (out & 1) <= half
        signed = ((product < 0) ^ (bits >> top)) == (out >> top)
        normal = (min(magnitude, size) >= least) & (max(magnitude, size) < infinity)
        wrong += not (near & signed & normal)
    return wrong


@njit(nogil=True, cache=True)
def _wrong_any(source, by, written, mantissa, exponent):
    wrong = 0
    for i in range(source.size):
        wrong += not _is_nearest(np.int64(source[i]), np.int64(written[i]), by[i], mantissa, exponent)
    return wrong


@njit(nogil=True, cache=True)
def check(source, factors, first, inner, written, mantissa, exponent):
    """How many written values are not source * factors rounded once; the arguments are those of `scale`.

    A product that is not a number always counts: it is never written.
    """
    wrong, factor = 0, np.empty(CHUNK)
    for start in range(0, source.size, CHUNK):
        src, out = source[start : start + CHUNK], written[start : start + CHUNK]
        by = factor[: src.size]
        _fill(factors, first + start, inner, by)
        if _wrong_normal(src, by, out, mantissa, exponent):
            wrong += _wrong_any(src, by, out, mantissa, exponent)
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
