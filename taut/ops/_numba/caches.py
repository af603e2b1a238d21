"""Inner loops of attention over rows of a cache, written as vectors.

What they add up stays in registers, so that they take as many rows, queries and features at once as the host has room
for. Rows of two bytes a number are bound by arithmetic as much as by memory. They ask for what is read next, every line
of it and evenly: a processor drops requests that come faster than memory answers. Float32 is bound by memory alone.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from taut.ops._numba.rows import LINE, indices, prefetch, walk
from taut.ops._numba.scalar import FLOAT, INT32, intrinsic, splat
from taut.ops._numba.simd import (
    BITS,
    FUSE,
    LANES,
    ROOMY,
    WIDTH,
    WORD,
    at,
    broadcast,
    load,
    multiply_add,
    rolled,
    store,
    totals,
    upto,
    zeros,
)

VECTOR = ir.VectorType(FLOAT, WIDTH)
PAIR = 2 * WIDTH
KEYS = 4
"""Keys of a tile."""
KEYS_AT_ONCE = {1: 4, 2: 4, 3: 4, 4: 4} if ROOMY else {1: 4, 2: 4, 3: 4, 4: 2}
FEATURES_AT_ONCE = {1: 64, 2: 64, 3: 64, 4: 64} if ROOMY else {1: 64, 2: 32, 3: 32, 4: 16}
"""Of a tile and of `blend`, by the number of queries: sums that leave registers for what is multiplied."""
PATCH = 1 << 30 if ROOMY else 32
"""Rows that `add_rows` takes at a time, all features of them: no more than stay in the first cache."""


def in_pairs(tag: types.Type) -> bool:
    """Whether numbers are taken in pairs: a register more, two instructions less."""
    return ROOMY and tag == types.uint16


@intrinsic
def asks_evenly(_typing, tag):
    """Whether every line that is read next is asked for while keys are, rather than every second one in two places."""
    return types.boolean(tag), lambda *_: ir.Constant(ir.IntType(1), not ROOMY or tag != types.float32)


def even_and_odd(builder: Any, place: Any) -> list[Any]:
    """The even and the odd ones of two registers of bfloat16, as float32: two instructions instead of four."""
    words = ir.VectorType(INT32, WIDTH)
    both = builder.load(builder.inttoptr(place, words.as_pointer()), align=2)
    even, odd = builder.shl(both, splat(words, 16)), builder.and_(both, splat(words, -65536))
    return [builder.bitcast(part, VECTOR) for part in (even, odd)]


def parts_of(builder: Any, place: Any, tag: types.Type, count: int, paired: bool) -> list[Any]:
    """`count` vectors of stored values; where `paired`, the even and the odd ones of two by turns."""
    size = BITS[tag] // 8
    if paired:
        pairs = [at(builder, place, (n, WIDTH * size)) for n in range(0, count, 2)]
        return [part for pair in pairs for part in even_and_odd(builder, pair)]
    return [load(builder, at(builder, place, (n, WIDTH * size)), tag, WIDTH) for n in range(count)]


@intrinsic
def as_read(_typing, tag, source, to, rows, k):
    """Where `tile` finds rows of k float32 that it multiplies with those of a tag: at the source, or arranged."""

    def generate(_context, builder, _signature, args):
        _, source, to, rows, k = args
        if not in_pairs(tag):
            return source
        size, zero = builder.mul(k, ir.Constant(WORD, 4)), ir.Constant(WORD, 0)
        with upto(builder, zero, rows) as row:
            here, there = (at(builder, base, (row.index, size)) for base in (source, to))

            def block(start: Any, count: Any | None) -> None:
                values = [load(builder, at(builder, here, (start, 4)), types.float32, WIDTH)]
                if count is None:
                    values.append(load(builder, at(builder, here, (start, 4), (1, 4 * WIDTH)), types.float32, WIDTH))
                    values = [builder.shuffle_vector(*values, indices(*range(n, PAIR, 2))) for n in (0, 1)]
                for n, value in enumerate(values):
                    store(builder, value, at(builder, there, (start, 4), (n, 4 * WIDTH)))

            walk(builder, k, PAIR, block)
        return to

    return types.int64(tag, *[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def tile(_typing, tag, count, x, x_stride, rows, row_stride, k, out, out_stride):
    """out[t, j] = x[t] . rows[j] for four rows and t below a constant `count` of at most 4; k is a multiple of 16.

    x is arranged by `as_read`.
    """
    many, kind = count.literal_value, types.unliteral(tag)
    at_once = KEYS_AT_ONCE[many]

    def generate(_context, builder, _signature, args):
        _, _, x, x_stride, rows, row_stride, k, out, out_stride = args
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]
        for first in range(0, KEYS, at_once):
            taken = [at(builder, rows, (j, row_stride)) for j in range(first, first + at_once)]
            found = products(builder, kind, taken, inputs, k)
            for t in range(0, many, WIDTH // at_once):
                some = found[t : t + WIDTH // at_once]
                sums = totals(builder, [vector for vectors in some for vector in vectors])
                for n in range(len(some)):
                    own = builder.shuffle_vector(sums, sums, indices(*range(n * at_once, (n + 1) * at_once)))
                    store(builder, own, at(builder, out, (t + n, out_stride), (first, 4)))

    return types.void(tag, count, *[types.int64] * 7), generate


def products(builder: Any, tag: types.Type, rows: list[Any], inputs: list[Any], k: Any) -> list[list[Any]]:
    """For every input and row a vector whose lanes add up to their product."""
    size, sums = BITS[tag] // 8, [zeros(builder, VECTOR, len(rows)) for _ in inputs]

    def block(start: Any, rest: Any | None) -> None:
        paired = in_pairs(tag) and rest is None
        count = 2 if paired or not ROOMY else 1
        parts = [parts_of(builder, at(builder, row, (start, size)), tag, count, paired) for row in rows]
        for n in range(count):
            values = [load(builder, at(builder, x, (start, 4), (n, 4 * WIDTH)), types.float32, WIDTH) for x in inputs]
            for j, part in enumerate(parts):
                for total, value in zip(sums, values, strict=True):
                    multiply_add(builder, total[j], part[n], value)

    if ROOMY:
        walk(builder, k, PAIR if in_pairs(tag) else WIDTH, block)
    else:
        with rolled(builder, ir.Constant(WORD, 0), k, PAIR) as start:
            block(start, None)
    return [[builder.load(total) for total in row] for row in sums]


@intrinsic(prefer_literal=True)
def blend(_typing, tag, count, weights, stride, rows, row_stride, many_rows, features, out, out_stride, after):
    """out[t] += sum over j of weights[t, j] rows[j], for t below a constant `count`, over a multiple of 16 features.

    `weights` (float32) and `out` (float32) have rows `stride` and `out_stride` bytes apart, `rows` (of the tag's
    format) `row_stride` bytes. Asks meanwhile for as much memory, `row_stride` bytes apart from the address `after` on,
    unless the rows are float32.
    """
    many, kind = count.literal_value, types.unliteral(tag)
    size = BITS[kind] // 8

    def generate(_context, builder, _signature, args):
        _, _, weights, stride, rows, row_stride, many_rows, features, out, out_stride, after = args

        def block(start: Any, wide: int) -> None:
            """So many vectors of features from a start on."""
            paired = in_pairs(kind) and wide % 2 == 0
            sums = [zeros(builder, VECTOR, wide) for _ in range(many)]
            with upto(builder, ir.Constant(WORD, 0), many_rows) as loop:
                row, soon = (at(builder, base, (loop.index, row_stride), (start, size)) for base in (rows, after))
                if kind != types.float32:
                    prefetch(builder, soon, -(-wide * WIDTH * size // LINE))
                places = [at(builder, weights, (t, stride), (loop.index, 4)) for t in range(many)]
                shares = [broadcast(builder, load(builder, place, types.float32, 1), WIDTH) for place in places]
                for n, value in enumerate(parts_of(builder, row, kind, wide, paired)):
                    for total, share in zip(sums, shares, strict=True):
                        multiply_add(builder, total[n], value, share)
            for t in range(many):
                found = [builder.load(total) for total in sums[t]]
                if paired:
                    found = [half for n in range(0, wide, 2) for half in side_by_side(builder, *found[n : n + 2])]
                for n, value in enumerate(found):
                    place = at(builder, out, (t, out_stride), (start, 4), (n * WIDTH, 4))
                    before = load(builder, place, types.float32, WIDTH)
                    store(builder, builder.fadd(before, value, flags=FUSE), place)

        wide = FEATURES_AT_ONCE[many]
        whole = builder.mul(builder.sdiv(features, ir.Constant(WORD, wide)), ir.Constant(WORD, wide))
        with rolled(builder, ir.Constant(WORD, 0), whole, wide) as start:
            block(start, wide // WIDTH)
        with rolled(builder, whole, features, LANES) as start:
            block(start, LANES // WIDTH)

    return types.void(tag, count, *[types.int64] * 9), generate


def side_by_side(builder: Any, even: Any, odd: Any) -> list[Any]:
    """What `even_and_odd` took apart."""
    order = [n // 2 + WIDTH * (n % 2) for n in range(PAIR)]
    return [builder.shuffle_vector(even, odd, indices(*order[n : n + WIDTH])) for n in (0, WIDTH)]
