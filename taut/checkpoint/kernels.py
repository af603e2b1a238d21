"""Kernels over the raw bits of float16, bfloat16, float32 and float64 rows.

All work on integers (uint16, uint32, uint64), release the GIL, and take a format as (mantissa bits, exponent bits).
`scale` multiplies by a vector in float64 and rounds once. `check` decides by another road whether a written value is
that product rounded: it rounds nothing, and asks whether the product lies between the two neighbouring midpoints.

Both go by short chunks and take the first road that is certain for a whole chunk. The shortest, for bfloat16, computes
in float32, which settles the matter wherever the product is farther from a midpoint than float32 errs. The next one
computes in float64 and supposes normal numbers. The last one supposes nothing.
"""

from __future__ import annotations

import numpy as np
from numba import njit

_INFINITY = 0x7FF << 52
_LARGEST = (1 << 63) - 1
CHUNK = 512
# A float32 product of float32-rounded factors is off by less than 3 units in the last place.
_UNSURE = 4


@njit(inline="always")
def _float(bits):
    return np.int64(bits).view(np.float64)


@njit(inline="always")
def _bits(value):
    return np.float64(value).view(np.int64)


@njit(inline="always")
def _float32(bits):
    return np.int32(bits).view(np.float32)


@njit(inline="always")
def _bits32(value):
    return np.float32(value).view(np.int32)


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
def _along(factors, first, inner, size, scratch):
    """factors[(first + i) // inner % len(factors)] for i < size: a view where they are neighbours, else in scratch."""
    column = first // inner % factors.size
    if inner == 1 and column + size <= factors.size:
        return factors[column : column + size]
    rest = inner - first % inner
    done = 0
    while done < size:
        count = min(size - done, rest)
        scratch[done : done + count] = factors[column]
        done += count
        rest = inner
        column = column + 1 if column + 1 < factors.size else 0
    return scratch[:size]


@njit(nogil=True, cache=True)
def _scale_bfloat16(source, by, target):
    """target = source * by in float32; returns whether all are normal numbers, surely rounded as float64 would be."""
    low, high, closest = np.int32(0x80), np.int32(0x80), np.int32(0x8000)
    for i in range(source.size):
        bits = np.int32(source[i])
        product = _bits32(_float32(np.int32(bits << np.int32(16))) * by[i])
        size = np.int32(product & np.int32(0x7FFFFFFF))
        odd = np.int32(np.int32(size >> np.int32(16)) & np.int32(1))
        rounded = np.int32(np.int32(size + np.int32(0x7FFF) + odd) >> np.int32(16))
        sign = np.int32(np.int32(product >> np.int32(16)) & np.int32(0x8000))
        target[i] = np.int32(rounded | sign)
        magnitude = np.int32(bits & np.int32(0x7FFF))
        low, high = min(low, min(magnitude, rounded)), max(high, max(magnitude, rounded))
        beyond = np.int32(np.int32(size & np.int32(0xFFFF)) - np.int32(0x8000))
        closest = min(closest, np.int32(abs(beyond)))
    return low >= 0x80 and high < 0x7F80 and closest > _UNSURE


@njit(nogil=True, cache=True)
def _scale_normal(source, by, target, mantissa, exponent):
    """target = source * by; returns whether all are normal numbers, for which alone it is right."""
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
    """target = source * by; returns how many overflowed and underflowed."""
    infinity, least = ((np.int64(1) << exponent) - 1) << mantissa, np.int64(1) << mantissa
    top = mantissa + exponent
    over, under = 0, 0
    for i in range(source.size):
        bits = np.int64(source[i])
        product = _product(bits, by[i], mantissa, exponent)
        rounded = _encode(product, mantissa, exponent)
        was_normal = bits & ((np.int64(1) << top) - 1) >= least
        over += (rounded == infinity) & (abs(product) < np.inf)
        under += (rounded < least) & was_normal & (product != 0)
        target[i] = rounded | ((_sign(product) if rounded <= infinity else np.int64(0)) << top)
    return over, under


@njit(nogil=True, cache=True)
def scale(source, factors, narrow, first, inner, target, mantissa, exponent):
    """target = source * factors, rounded once; returns how many overflowed and underflowed.

    source, target: flat unsigned integers holding the bits. Element i is multiplied by
    factors[(first + i) // inner % len(factors)]. narrow: the factors in float32, or empty where some are not normal
    numbers there.
    """
    over, under = 0, 0
    factor, short = np.empty(CHUNK), np.empty(CHUNK, np.float32)
    try_short = narrow.size > 0 and mantissa == 7 and exponent == 8
    for start in range(0, source.size, CHUNK):
        src, out = source[start : start + CHUNK], target[start : start + CHUNK]
        if try_short and _scale_bfloat16(src, _along(narrow, first + start, inner, src.size, short), out):
            continue
        by = _along(factors, first + start, inner, src.size, factor)
        if not _scale_normal(src, by, out, mantissa, exponent):
            o, u = _scale_any(src, by, out, mantissa, exponent)
            over += o
            under += u
    return over, under


@njit(nogil=True, cache=True)
def _right_bfloat16(source, by, written):
    """Whether all are normal numbers and surely less than half a step from source * by."""
    low, high, farthest, signs = np.int32(0x80), np.int32(0x80), np.int32(0), np.int32(0)
    for i in range(source.size):
        bits, out = np.int32(source[i]), np.int32(written[i])
        product = _bits32(_float32(np.int32(bits << np.int32(16))) * by[i])
        magnitude, size = np.int32(bits & np.int32(0x7FFF)), np.int32(out & np.int32(0x7FFF))
        distance = np.int32(np.int32(product & np.int32(0x7FFFFFFF)) - np.int32(size << np.int32(16)))
        signs = np.int32(signs | np.int32(np.int32(product >> np.int32(16)) ^ out))
        low, high = min(low, min(magnitude, size)), max(high, max(magnitude, size))
        farthest = max(farthest, np.int32(abs(distance)))
    return low >= 0x80 and high < 0x7F80 and farthest < 0x8000 - _UNSURE and signs & 0x8000 == 0


@njit(nogil=True, cache=True)
def _right_normal(source, by, written, mantissa, exponent):
    """Whether all are normal numbers and at most half a step from source * by, half a step only where even.

    The bits of neighbouring magnitudes are neighbouring integers, so distances are differences of bits.
    """
    infinity, least = ((np.int64(1) << exponent) - 1) << mantissa, np.int64(1) << mantissa
    shift, top = 52 - mantissa, mantissa + exponent
    rebias = np.int64(1024 - (1 << (exponent - 1))) << 52
    mask = (np.int64(1) << top) - 1
    low, high, farthest, signs = least, least, np.int64(0), np.int64(0)
    for i in range(source.size):
        bits, out = np.int64(source[i]), np.int64(written[i])
        magnitude, size = bits & mask, out & mask
        product = _bits(_float((magnitude << shift) + rebias) * by[i])
        distance = abs((product & _LARGEST) - ((size << shift) + rebias)) + (out & 1)
        signs |= ((product < 0) ^ (bits >> top)) ^ (out >> top)
        low, high = min(low, min(magnitude, size)), max(high, max(magnitude, size))
        farthest = max(farthest, distance)
    return low >= least and high < infinity and farthest <= np.int64(1) << (shift - 1) and signs == 0


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
def _wrong(source, by, written, mantissa, exponent):
    wrong = 0
    for i in range(source.size):
        wrong += not _is_nearest(np.int64(source[i]), np.int64(written[i]), by[i], mantissa, exponent)
    return wrong


@njit(nogil=True, cache=True)
def check(source, factors, narrow, first, inner, written, mantissa, exponent):
    """How many written values are not source * factors rounded once; the arguments are those of `scale`.

    A product that is not a number always counts: it is never written.
    """
    wrong = 0
    factor, short = np.empty(CHUNK), np.empty(CHUNK, np.float32)
    try_short = narrow.size > 0 and mantissa == 7 and exponent == 8
    for start in range(0, source.size, CHUNK):
        src, out = source[start : start + CHUNK], written[start : start + CHUNK]
        if try_short and _right_bfloat16(src, _along(narrow, first + start, inner, src.size, short), out):
            continue
        by = _along(factors, first + start, inner, src.size, factor)
        if not _right_normal(src, by, out, mantissa, exponent):
            wrong += _wrong(src, by, out, mantissa, exponent)
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
