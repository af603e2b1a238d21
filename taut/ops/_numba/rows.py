"""Products of a few tokens with the rows of a weight in any stored format: every row is read once.

A tile is four rows by up to four tokens. One vector of 16 lanes collects each product in the order of the inputs, and
its lanes are added in a fixed tree, so a product does not depend on the tile, the batch or the thread it came from.
"""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import njit, types
from numba.core import cgutils

from taut.ops._numba.scalar import FLOAT, INT32, JIT, array, intrinsic, span, splat, widen
from taut.ops._numba.simd import (
    BITS,
    GROUP,
    LANES,
    VECTOR,
    WORD,
    at,
    load,
    multiply_add,
    store,
    totals,
    upto,
    zeros,
)

ROWS = 4
AHEAD, LINE = 20480, 64
"""How far ahead to ask for memory, in bytes: four rows at once are more than the hardware foresees."""
FLOAT32, BFLOAT16, FLOAT16, INT8, INT4_HALF, INT4_FLOAT = range(6)
"""Formats of a weight: three floating ones, int8 with a float32 scale a row, int4 with a scale a group of 32."""

BYTES, WORDS = ir.VectorType(ir.IntType(8), LANES), ir.VectorType(INT32, LANES)
LOOKUP = bool(binding.get_host_cpu_features().get("avx512f"))
"""Whether one instruction looks 16 values up in a table of 16."""


def sums_of(builder: Any, sums: list[list[Any]], out: Any, out_stride: Any) -> None:
    """out[t, j] = the sum of the lanes of sums[j][t]"""
    tokens = len(sums[0])
    vectors = [builder.load(row[t]) for t in range(tokens) for row in sums]
    whole = totals(builder, vectors + [splat(VECTOR, 0.0)] * (LANES - len(vectors)))
    for t in range(tokens):
        lanes = [ir.Constant(INT32, len(sums) * t + j) for j in range(len(sums))]
        part = builder.shuffle_vector(whole, whole, ir.Constant(ir.VectorType(INT32, len(sums)), lanes))
        store(builder, part, at(builder, out, (t, out_stride)))


def load_first(builder: Any, address: Any, tag: types.Type, count: Any) -> Any:
    """The first `count` stored values at an address as float32, and zeros."""
    kind = ir.VectorType(FLOAT if tag == types.float32 else ir.IntType(BITS[tag]), LANES)
    lane = ir.Constant(WORDS, [ir.Constant(INT32, n) for n in range(LANES)])
    many = builder.insert_element(ir.Constant(WORDS, ir.Undefined), builder.trunc(count, INT32), ir.Constant(INT32, 0))
    many = builder.shuffle_vector(many, ir.Constant(WORDS, ir.Undefined), splat(WORDS, 0))
    seen = builder.icmp_signed("<", lane, many)
    element = "f32" if tag == types.float32 else f"i{BITS[tag]}"
    name, place = f"llvm.masked.load.v{LANES}{element}.p0", builder.inttoptr(address, kind.as_pointer())
    signature = ir.FunctionType(kind, [place.type, INT32, seen.type, kind])
    read = cgutils.get_or_insert_function(builder.module, signature, name)
    nothing = ir.Constant(kind, None)
    return widen(builder, builder.call(read, [place, ir.Constant(INT32, BITS[tag] // 8), seen, nothing]), tag)


def prefetch(builder: Any, address: Any, count: int) -> None:
    """Ask for `count` cache lines."""
    place = ir.IntType(8).as_pointer()
    kind = ir.FunctionType(ir.VoidType(), [place, INT32, INT32, INT32])
    ask = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
    how = [ir.Constant(INT32, n) for n in (0, 3, 1)]
    for line in range(count):
        builder.call(ask, [builder.inttoptr(at(builder, address, (1, LINE * line)), place), *how])


@intrinsic
def fetch(_typing, address, size):
    """Ask for `size` bytes of memory from an address on."""

    def generate(context, builder, _signature, args):
        address, size = args
        with upto(builder, ir.Constant(WORD, 0), builder.sdiv(size, ir.Constant(WORD, LINE))) as loop:
            prefetch(builder, at(builder, address, (loop.index, LINE)), 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def tile(_typing, tag, rows, tokens, w, w_stride, ahead, x, x_stride, k, out, out_stride):
    """out[t, j] = w[j] . x[t] for constant numbers of `rows` and `tokens`; x is float32, padded to 16 with zeros.

    Asks meanwhile for as much memory from `ahead` on as it reads of the weight, where that is an address.
    """
    height, many, kind = rows.literal_value, tokens.literal_value, types.unliteral(tag)

    def generate(_context, builder, _signature, args):
        _, _, _, w, w_stride, ahead, x, x_stride, k, out, out_stride = args
        sums = [zeros(builder, VECTOR, many) for _ in range(height)]
        zero, lanes = ir.Constant(WORD, 0), ir.Constant(WORD, LANES)
        starts = [at(builder, w, (j, w_stride)) for j in range(height)]
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]

        def block(start: Any, read: Any) -> None:
            values = [read(at(builder, row, (start, BITS[kind] // 8))) for row in starts]
            for t in range(many):
                value = load(builder, at(builder, inputs[t], (start, 4)), types.float32, LANES)
                for j in range(height):
                    multiply_add(builder, sums[j][t], values[j], value)

        whole = builder.sdiv(k, lanes)
        with upto(builder, zero, whole) as loop:
            if height == ROWS:
                used = ROWS * LANES * BITS[kind] // 8
                prefetch(builder, at(builder, ahead, (loop.index, used)), used // LINE)
            block(builder.mul(loop.index, lanes), lambda place: load(builder, place, kind, LANES))
        start = builder.mul(whole, lanes)
        rest = builder.sub(k, start)
        with builder.if_then(builder.icmp_signed(">", rest, zero)):
            block(start, lambda place: load_first(builder, place, kind, rest))
        sums_of(builder, sums, out, out_stride)

    return types.void(tag, rows, tokens, *[types.int64] * 8), generate


def load_everywhere(builder: Any, address: Any, tag: types.Type) -> Any:
    """A stored value in all lanes; spread before it is widened, which is one instruction less than after it."""
    kind = FLOAT if tag == types.float32 else ir.IntType(BITS[tag])
    vector = ir.VectorType(kind, LANES)
    value = builder.load(builder.inttoptr(address, kind.as_pointer()), align=BITS[tag] // 8)
    first = builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(INT32, 0))
    spread = builder.shuffle_vector(first, ir.Constant(vector, ir.Undefined), splat(WORDS, 0))
    return widen(builder, spread, tag)


def look_up(builder: Any, table: Any, codes: Any) -> Any:
    """table[code % 16] for 16 codes."""
    kind = ir.FunctionType(VECTOR, [VECTOR, WORDS])
    call = cgutils.get_or_insert_function(builder.module, kind, "llvm.x86.avx512.permvar.sf.512")
    return builder.call(call, [table, codes])


def unpacked(builder: Any, codes: Any, scale: Any) -> list[Any]:
    """scale (code - 8) of the low halves and of the high halves of 16 bytes."""
    codes = builder.zext(codes, WORDS)
    high = builder.lshr(codes, splat(WORDS, 4))
    if LOOKUP:
        steps = ir.Constant(VECTOR, [ir.Constant(FLOAT, n - 8.0) for n in range(16)])
        table = builder.fmul(steps, scale)
        return [look_up(builder, table, n) for n in (codes, high)]
    # Or-ing a code below 2^23 into the bits of 2^23 makes 2^23 + code without a conversion.
    low = builder.and_(codes, splat(WORDS, 15))
    halves = [builder.bitcast(builder.or_(n, splat(WORDS, 0x4B000000)), VECTOR) for n in (low, high)]
    return [builder.fmul(builder.fsub(n, splat(VECTOR, 2.0**23 + 8)), scale) for n in halves]


@intrinsic(prefer_literal=True)
def tile_int4(_typing, tag, rows, tokens, w, w_stride, ahead, s, s_stride, x, x_stride, groups, out, out_stride):
    """`tile` of int4 codes in `groups` of 32 (16 bytes each, biased by 8), with a scale a group in the tag's format."""
    height, many, kind = rows.literal_value, tokens.literal_value, types.unliteral(tag)

    def generate(_context, builder, _signature, args):
        _, _, _, w, w_stride, ahead, s, s_stride, x, x_stride, groups, out, out_stride = args
        sums = [zeros(builder, VECTOR, many) for _ in range(height)]
        starts = [at(builder, w, (j, w_stride)) for j in range(height)]
        scales = [at(builder, s, (j, s_stride)) for j in range(height)]
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]
        with upto(builder, ir.Constant(WORD, 0), groups) as loop:
            values = []
            if height == ROWS:
                prefetch(builder, at(builder, ahead, (loop.index, LINE)), 1)
            for row, scale in zip(starts, scales, strict=True):
                place = builder.inttoptr(at(builder, row, (loop.index, 16)), BYTES.as_pointer())
                factor = load_everywhere(builder, at(builder, scale, (loop.index, BITS[kind] // 8)), kind)
                values.append(unpacked(builder, builder.load(place, align=1), factor))
            for t in range(many):
                for half in range(2):
                    start = at(builder, inputs[t], (loop.index, 4 * GROUP), (half, 4 * LANES))
                    value = load(builder, start, types.float32, LANES)
                    for j in range(height):
                        multiply_add(builder, sums[j][t], values[j][half], value)
        sums_of(builder, sums, out, out_stride)

    return types.void(tag, rows, tokens, *[types.int64] * 10), generate


@njit(**JIT)
def tiles(w, w_stride, ahead, x, x_stride, tokens, k, out, out_stride, tag):
    """Four rows by any number of tokens."""
    t = 0
    while t + 4 <= tokens:
        tile(tag, ROWS, 4, w, w_stride, ahead, x + t * x_stride, x_stride, k, out + t * out_stride, out_stride)
        t += 4
    if t + 2 <= tokens:
        tile(tag, ROWS, 2, w, w_stride, ahead, x + t * x_stride, x_stride, k, out + t * out_stride, out_stride)
        t += 2
    if t < tokens:
        tile(tag, ROWS, 1, w, w_stride, ahead, x + t * x_stride, x_stride, k, out + t * out_stride, out_stride)


@njit(**JIT)
def tiles_int4(w, w_stride, ahead, s, s_stride, x, x_stride, tokens, groups, out, out_stride, tag):
    t = 0
    while t + 4 <= tokens:
        at, to = x + t * x_stride, out + t * out_stride
        tile_int4(tag, ROWS, 4, w, w_stride, ahead, s, s_stride, at, x_stride, groups, to, out_stride)
        t += 4
    if t + 2 <= tokens:
        at, to = x + t * x_stride, out + t * out_stride
        tile_int4(tag, ROWS, 2, w, w_stride, ahead, s, s_stride, at, x_stride, groups, to, out_stride)
        t += 2
    if t < tokens:
        at, to = x + t * x_stride, out + t * out_stride
        tile_int4(tag, ROWS, 1, w, w_stride, ahead, s, s_stride, at, x_stride, groups, to, out_stride)


@njit(**JIT)
def further(place, stop, after):
    """AHEAD bytes on from a place, where what is read goes on at `after` from `stop` on."""
    return place + AHEAD if place + AHEAD < stop else after + (place + AHEAD - stop)


@njit(**JIT)
def dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    size = k * array(w, 1, tag).itemsize
    row = first
    while row + ROWS <= last:
        at = w + row * size
        ahead = further(at, w + last * size, after)
        tiles(at, size, ahead, x, x_stride, tokens, k, out + 4 * (row - first), out_stride, tag)
        row += ROWS
    for r in range(row, last):
        for t in range(tokens):
            to = out + t * out_stride + 4 * (r - first)
            tile(tag, 1, 1, w + r * size, size, 0, x + t * x_stride, x_stride, k, to, out_stride)


@njit(**JIT)
def grouped(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    groups = k // 32
    size, wide = k // 2, groups * array(s, 1, tag).itemsize
    row = first
    while row + ROWS <= last:
        at, to = w + row * size, out + 4 * (row - first)
        ahead = further(at, w + last * size, after)
        tiles_int4(at, size, ahead, s + row * wide, wide, x, x_stride, tokens, groups, to, out_stride, tag)
        row += ROWS
    for r in range(row, last):
        for t in range(tokens):
            to, at = out + t * out_stride + 4 * (r - first), x + t * x_stride
            tile_int4(tag, 1, 1, w + r * size, size, 0, s + r * wide, wide, at, x_stride, groups, to, out_stride)


@njit(**JIT)
def scale_rows(s, tokens, first, last, out, out_stride):
    scales = array(s + 4 * first, last - first, np.float32(0))
    for t in range(tokens):
        row = array(out + t * out_stride, last - first, np.float32(0))
        for i in range(last - first):
            row[i] *= scales[i]


@njit(**JIT)
def products(form, w, s, x, x_stride, tokens, k, first, last, out, out_stride, after):
    """out[t, r - first] = (row r of the weight) . x[t] for the rows from first to last; strides are in bytes.

    `form` is one of the formats above; x is float32, its rows padded to a multiple of 16 with zeros. `after` is where
    the caller will read next, which is fetched meanwhile.
    """
    if form == FLOAT32:
        dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, np.float32(0))
    elif form == BFLOAT16:
        dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, np.uint16(0))
    elif form == FLOAT16:
        dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, np.int16(0))
    elif form == INT8:
        dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, np.int8(0))
        scale_rows(s, tokens, first, last, out, out_stride)
    elif form == INT4_HALF:
        grouped(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after, np.int16(0))
    else:
        grouped(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after, np.float32(0))


@njit(**JIT)
def share_of(n, part, parts):
    """The part-th share of n rows, in whole tiles."""
    first, last = span((n + ROWS - 1) // ROWS, part, parts)
    return first * ROWS, min(last * ROWS, n)


@njit(**JIT)
def place_of(form, w, k, row):
    """Where a row of a weight of k inputs begins."""
    size = k // 2
    if form == FLOAT32:
        size = 4 * k
    elif form in (BFLOAT16, FLOAT16):
        size = 2 * k
    elif form == INT8:
        size = k
    return w + row * size
