"""Products of a few tokens with the rows of a weight in any stored format."""

from __future__ import annotations

from typing import Any

import numpy as np

from taut.ops._numba.abreast import abreast, size_of_block, whole
from taut.ops._numba.kernels import Address, jit, kernel
from taut.ops._numba.nibbles import grouped
from taut.ops._numba.rows import ROWS, dense
from taut.ops._numba.scalar import array, span
from taut.ops._numba.simd import LANES

FLOAT32, BFLOAT16, FLOAT16 = range(3)
FLOAT32_ABREAST, BFLOAT16_ABREAST, FLOAT16_ABREAST, INT8_ABREAST = range(3, 7)
FLOAT32_COMPRESSED, BFLOAT16_COMPRESSED = range(7, 9)
INT8, INT4_HALF, INT4_FLOAT = range(9, 12)
"""Formats of a weight: three floating ones, the same and int8 with sixteen rows abreast, two of these compressed, int8
with a float32 scale a row, int4 with a scale a group of 32."""


@jit
def scale_rows(s, tokens, first, last, out, out_stride):
    scales = array(s + 4 * first, last - first, np.float32(0))
    for t in range(tokens):
        row = array(out + t * out_stride, last - first, np.float32(0))
        for i in range(last - first):
            row[i] *= scales[i]


# One for each function: kept by value, a compiled one would be another in every process, and nothing be found on disk.
def in_rows(tag: Any) -> Address:
    """`PRODUCTS` of a weight whose rows lie one after the other."""

    @kernel
    def products(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after):
        dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag)
        if s:
            scale_rows(s, tokens, first, last, out, out_stride)

    return products


def in_blocks(tag: Any) -> Address:
    """`PRODUCTS` of a weight with sixteen rows abreast."""

    @kernel
    def products(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after):
        abreast(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag)
        if s:
            scale_rows(s, tokens, first, last, out, out_stride)

    return products


def in_groups(s_tag: Any) -> Address:
    """`PRODUCTS` of an int4 weight with scales of a type."""

    @kernel
    def products(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after):
        grouped(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after, s_tag)

    return products


PRODUCTS = {
    FLOAT32: in_rows(np.float32(0)),
    BFLOAT16: in_rows(np.uint16(0)),
    FLOAT16: in_rows(np.int16(0)),
    FLOAT32_ABREAST: in_blocks(np.float32(0)),
    BFLOAT16_ABREAST: in_blocks(np.uint16(0)),
    FLOAT16_ABREAST: in_blocks(np.int16(0)),
    INT8_ABREAST: in_blocks(np.int8(0)),
    FLOAT32_COMPRESSED: in_blocks(np.uint32(0)),
    BFLOAT16_COMPRESSED: in_blocks(np.uint8(0)),
    INT8: in_rows(np.int8(0)),
    INT4_HALF: in_groups(np.int16(0)),
    INT4_FLOAT: in_groups(np.float32(0)),
}
"""Of every format the kernel of out[t, r - first] = (row r of the weight) . x[t] for the rows from first to last.

Strides are in bytes. x is float32, its rows padded to a multiple of 16 with zeros, for int4 arranged. Of rows abreast
the first is a multiple of 16, and whole blocks of them are written. `after` is where the caller will read next, which
is fetched meanwhile."""


@jit
def is_abreast(form):
    return FLOAT32_ABREAST <= form <= BFLOAT16_COMPRESSED


@jit
def share_of(n, part, parts, tile=ROWS):
    """The part-th share of n rows, in whole tiles."""
    first, last = span((n + tile - 1) // tile, part, parts)
    return first * tile, min(last * tile, n)


@jit
def place_of(form, w, k, row):
    """Where a row of a weight of k inputs begins, or the rows abreast from it on."""
    if form == FLOAT32_COMPRESSED:
        return w + row // LANES * size_of_block(w, k, np.uint32(0))
    if form == BFLOAT16_COMPRESSED:
        return w + row // LANES * size_of_block(w, k, np.uint8(0))
    if is_abreast(form):
        k = whole(k)
    size = k // 2
    if form in (FLOAT32, FLOAT32_ABREAST):
        size = 4 * k
    elif form in (BFLOAT16, FLOAT16, BFLOAT16_ABREAST, FLOAT16_ABREAST):
        size = 2 * k
    elif form in (INT8, INT8_ABREAST):
        size = k
    return w + row * size
