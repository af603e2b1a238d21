"""How a weight is compressed: the tables of its blocks, then its rounds by vectors (see compressed.py)."""

from __future__ import annotations

from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from taut.ops._numba.compressed import (
    BYTE,
    EXCEPTION,
    HEAD,
    LOWS,
    NAMES,
    NEXT,
    NUMBERS,
    QUARTER,
    UNUSED,
    loaded,
    size_of_block,
    size_of_round,
)
from taut.ops._numba.kernels import jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.rows import indices
from taut.ops._numba.scalar import INT16, array, intrinsic, span, splat, words
from taut.ops._numba.simd import BITS, WIDTH, at, store
from taut.ops._weights import ABREAST, INPUTS


@jit
def high_byte(place, size):
    """Of a number of so many bytes."""
    return array(place + size - 1, 1, np.uint8(0))[0]


@jit
def name_part(part, parts, w, n, k, size, tables, counts, most):
    """Write the tables of a share of the blocks, and the most exceptions of one of them."""
    counts, most = words(counts + 8 * 256 * part, 256), words(most + 8 * part, 1)
    for block in range(*span((n + ABREAST - 1) // ABREAST, part, parts)):
        rows, table = min(ABREAST, n - block * ABREAST), array(tables + block * NAMES, NAMES, np.uint8(0))
        counts[:] = 0
        for i in range(rows * k):
            counts[high_byte(w + (block * ABREAST * k + i) * size, size)] += 1
        counts[0], table[0] = 0, 0
        for name in range(1, NAMES):
            best = 0
            for high in range(1, 256):
                if counts[high] > counts[best]:
                    best = high
            table[name], counts[best] = best, 0
        unnamed = 0
        for count in counts:
            unnamed += count
        most[0] = max(most[0], unnamed)


share_names = shared(name_part)


@jit
def name_all(w, n, k, size, tables, counts, most, parts):
    """Write the tables of a weight (n, k) of numbers of so many bytes, and the most exceptions of a block of each part.

    A table has zero and the fifteen high bytes that are most frequent in its block. `counts` has room for 256 int64 a
    part, `most` zeros for one.
    """
    share_names(parts, (w, n, k, size, tables, counts, most))


@intrinsic
def pack(_typing, tag, w, row_size, table, to):
    """Write a round of 16 rows, the first of which begins at w; whether it has exceptions, which are zeros there."""
    size = BITS[tag] // 8
    kind = ir.IntType(8 * size)

    def quarter(builder: Any, place: Any, row_size: Any) -> Any:
        """The bits of four rows, as inputs of rows of each input."""
        rows = [loaded(builder, at(builder, place, (r, row_size)), kind, INPUTS) for r in range(QUARTER)]
        while len(rows) > 1:
            rows = [joined(builder, *two) for two in zip(rows[::2], rows[1::2], strict=True)]
        turned = indices(*(r * INPUTS + n for n in range(INPUTS) for r in range(QUARTER)))
        return builder.shuffle_vector(rows[0], rows[0], turned)

    def byte(builder: Any, numbers: list[Any], from_top: int) -> Any:
        """One byte of all numbers."""
        shift = splat(numbers[0].type, 8 * (size - from_top))
        parts = [builder.trunc(builder.lshr(n, shift), ir.VectorType(BYTE, n.type.count)) for n in numbers]
        return joined(builder, joined(builder, *parts[:2]), joined(builder, *parts[2:]))

    def generate(_context, builder, _signature, args):
        _, w, row_size, table, to = args
        numbers = [quarter(builder, at(builder, w, (q * QUARTER, row_size)), row_size) for q in range(4)]
        high = byte(builder, numbers, 1)
        zero, names = ir.Constant(high.type, None), ir.Constant(high.type, None)
        for name in range(1, NAMES):
            entry = loaded(builder, at(builder, table, (name, 1)), BYTE, 1)
            entry = builder.shuffle_vector(entry, entry, indices(*[0] * NUMBERS))
            names = builder.select(builder.icmp_unsigned("==", high, entry), splat(high.type, name), names)
        unknown = builder.and_(builder.icmp_unsigned("==", names, zero), builder.icmp_unsigned("!=", high, zero))
        halves = [builder.shuffle_vector(names, names, indices(*range(n, n + NEXT))) for n in (0, NEXT)]
        store(builder, builder.or_(halves[0], builder.shl(halves[1], splat(halves[1].type, 4))), to)
        store(builder, builder.select(unknown, zero, byte(builder, numbers, 2)), at(builder, to, (1, NEXT)))
        for q, some in enumerate(numbers) if size == 4 else ():
            mine = builder.shuffle_vector(unknown, unknown, indices(*range(16 * q, 16 * q + 16)))
            low = builder.trunc(some, ir.VectorType(INT16, 16))
            low = builder.select(mine, ir.Constant(low.type, None), low)
            part, each = q * QUARTER // WIDTH, WIDTH // QUARTER
            for pair in range(2):
                place = at(builder, to, (1, LOWS), (16, (2 * part + pair) * each + q % each))
                store(builder, builder.shuffle_vector(low, low, indices(*range(8 * pair, 8 * pair + 8))), place)
        every = builder.bitcast(unknown, ir.IntType(NUMBERS))
        return builder.icmp_unsigned("!=", every, ir.Constant(every.type, 0))

    return types.boolean(tag, *[types.int64] * 4), generate


def joined(builder: Any, a: Any, b: Any) -> Any:
    return builder.shuffle_vector(a, b, indices(*range(2 * a.type.count)))


@jit
def compress_part(part, parts, w, n, k, tables, room, edges, to, tag):
    """Write a share of the blocks. What is at the edge of the weight is packed from a copy with zeros around it."""
    size = array(w, 1, tag).itemsize
    rounds, row_size, whole = (k + INPUTS - 1) // INPUTS, k * size, size_of_block(k, size, room)
    edge = edges + part * NUMBERS * size
    for block in range(*span((n + ABREAST - 1) // ABREAST, part, parts)):
        rows, source, begin = min(ABREAST, n - block * ABREAST), w + block * ABREAST * row_size, to + block * whole
        table, end = tables + block * NAMES, begin + whole - room * EXCEPTION
        array(begin, HEAD, np.uint8(0))[:] = 0
        copy_bytes(table, begin, NAMES)
        array(begin + NAMES, 1, np.int32(0))[0] = room
        array(end, room * EXCEPTION, np.uint8(0))[:] = UNUSED
        for i in range(rounds):
            taken, at, apart = min(INPUTS, k - i * INPUTS), source + i * INPUTS * size, row_size
            if rows < ABREAST or taken < INPUTS:
                array(edge, NUMBERS * size, np.uint8(0))[:] = 0
                for row in range(rows):
                    copy_bytes(at + row * row_size, edge + row * INPUTS * size, taken * size)
                at, apart = edge, INPUTS * size
            if pack(tag, at, apart, table, begin + HEAD + i * size_of_round(size)):
                end = put_exceptions(at, apart, size, i * INPUTS, table, end)


share_blocks = shared(compress_part)


@jit
def compress(w, n, k, tables, room, edges, to, tag, parts):
    """Write a weight (n, k) of the tag's type, with room for so many exceptions a block.

    `edges` has room for a round of the weight a part.
    """
    share_blocks(parts, (w, n, k, tables, room, edges, to, tag))


@jit
def copy_bytes(source, to, count):
    read, written = array(source, count, np.uint8(0)), array(to, count, np.uint8(0))
    for i in range(count):
        written[i] = read[i]


@jit
def put_exceptions(w, row_size, size, first, table, to):
    """Write those of a round, of inputs from the first on, and give where the next one goes."""
    names = array(table, NAMES, np.uint8(0))
    for row in range(ABREAST):
        for n in range(INPUTS):
            place, named = w + row * row_size + n * size, False
            for name in names:
                named = named or name == high_byte(place, size)
            if not named:
                array(to, 2, np.int32(0))[:] = 0
                array(to, 1, np.int32(0))[0] = (first + n) * ABREAST + row
                copy_bytes(place, to + EXCEPTION - size, size)
                to += EXCEPTION
    return to
