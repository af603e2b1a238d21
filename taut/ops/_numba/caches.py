"""Inner loops of attention over rows of a cache, written as vectors.

Rows of two bytes a number are bound by arithmetic as much as by memory. They ask for what is read next, every line of
it and evenly: a processor drops requests that come faster than memory answers. Float32 is bound by memory alone.
"""

from __future__ import annotations

from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from taut.ops._numba.rows import LINE, indices, prefetch, walk
from taut.ops._numba.scalar import FLOAT, INT32, intrinsic, splat
from taut.ops._numba.simd import (
    BITS,
    FUSE,
    LANES,
    VECTOR,
    WORD,
    at,
    broadcast,
    load,
    multiply_add,
    store,
    totals,
    upto,
    zeros,
)

PAIR = 2 * LANES
KEYS = 4
"""Keys of a tile."""


@intrinsic
def asks_evenly(_typing, tag):
    """Whether `blend` asks for memory too."""

    def generate(_context, _builder, _signature, _args):
        return ir.Constant(ir.IntType(1), tag != types.float32)

    return types.boolean(tag), generate


def even_and_odd(builder: Any, place: Any, lanes: int = LANES) -> list[Any]:
    """The even and the odd ones of twice `lanes` bfloat16, as float32: two instructions instead of four."""
    words = ir.VectorType(INT32, lanes)
    both = builder.load(builder.inttoptr(place, words.as_pointer()), align=2)
    even, odd = builder.shl(both, splat(words, 16)), builder.and_(both, splat(words, -65536))
    return [builder.bitcast(part, ir.VectorType(FLOAT, lanes)) for part in (even, odd)]


def loaded(builder: Any, place: Any, tag: types.Type, paired: bool) -> list[Any]:
    """32 stored values: the even and the odd ones where `paired`, else one half after the other."""
    if paired:
        return even_and_odd(builder, place)
    return [load(builder, at(builder, place, (n, BITS[tag] // 8)), tag, LANES) for n in (0, LANES)]


@intrinsic
def as_read(_typing, tag, source, to, rows, k):
    """Where `tile` finds rows of k float32 that it multiplies with those of a tag: at the source, or arranged."""

    def generate(_context, builder, _signature, args):
        _, source, to, rows, k = args
        if tag != types.uint16:
            return source
        size, zero = builder.mul(k, ir.Constant(WORD, 4)), ir.Constant(WORD, 0)
        with upto(builder, zero, rows) as row:
            here, there = (at(builder, base, (row.index, size)) for base in (source, to))

            def block(start: Any, count: Any | None) -> None:
                values = [load(builder, at(builder, here, (start, 4)), types.float32, LANES)]
                if count is None:
                    values.append(load(builder, at(builder, here, (start, 4), (1, 4 * LANES)), types.float32, LANES))
                    values = [builder.shuffle_vector(*values, indices(*range(n, PAIR, 2))) for n in (0, 1)]
                for n, value in enumerate(values):
                    store(builder, value, at(builder, there, (start, 4), (n, 4 * LANES)))

            walk(builder, k, PAIR, block)
        return to

    return types.int64(tag, *[types.int64] * 4), generate


@intrinsic(prefer_literal=True)
def tile(_typing, tag, count, x, x_stride, rows, row_stride, k, out, out_stride):
    """out[t, j] = x[t] . rows[j] for four rows and t below a constant `count` of at most 4; k is a multiple of 16.

    x is arranged by `as_read`.
    """
    many, kind = count.literal_value, types.unliteral(tag)
    size = BITS[kind] // 8

    def generate(_context, builder, _signature, args):
        _, _, x, x_stride, rows, row_stride, k, out, out_stride = args
        sums = [zeros(builder, VECTOR, KEYS) for _ in range(many)]

        def block(start: Any, rest: Any | None) -> None:
            places = [at(builder, rows, (j, row_stride), (start, size)) for j in range(KEYS)]
            if rest is None and kind == types.uint16:
                parts = [even_and_odd(builder, place) for place in places]
            else:
                parts = [[load(builder, place, kind, LANES)] for place in places]
            for n, t in product(range(len(parts[0])), range(many)):
                value = load(builder, at(builder, x, (t, x_stride), (start, 4), (n, 4 * LANES)), types.float32, LANES)
                for j in range(KEYS):
                    multiply_add(builder, sums[t][j], parts[j][n], value)

        walk(builder, k, PAIR if kind == types.uint16 else LANES, block)
        vectors = [builder.load(total) for row in sums for total in row]
        whole = totals(builder, vectors + [splat(VECTOR, 0.0)] * (LANES - len(vectors)))
        for t in range(many):
            quarter = indices(*range(KEYS * t, KEYS * (t + 1)))
            store(builder, builder.shuffle_vector(whole, whole, quarter), at(builder, out, (t, out_stride)))

    return types.void(tag, count, *[types.int64] * 7), generate


@intrinsic(prefer_literal=True)
def blend(_typing, tag, count, blocks, weights, stride, rows, row_stride, many_rows, out, out_stride, after):
    """out[t] += sum over j of weights[t, j] rows[j], for t below a constant `count`, over 16 `blocks` features.

    `weights` (float32) and `out` (float32) have rows `stride` and `out_stride` bytes apart, `rows` (of the tag's
    format) `row_stride` bytes. Asks meanwhile for as much memory, `row_stride` bytes apart from the address `after` on,
    unless the rows are float32.
    """
    many, wide, kind = count.literal_value, blocks.literal_value, types.unliteral(tag)
    size = BITS[kind] // 8
    paired = kind == types.uint16 and wide % 2 == 0

    def generate(_context, builder, _signature, args):
        _, _, _, weights, stride, rows, row_stride, many_rows, out, out_stride, after = args
        sums = [zeros(builder, VECTOR, wide) for _ in range(many)]
        with upto(builder, ir.Constant(WORD, 0), many_rows) as loop:
            row = at(builder, rows, (loop.index, row_stride))
            if kind != types.float32:
                prefetch(builder, at(builder, after, (loop.index, row_stride)), wide * LANES * size // LINE)
            if wide == 1:
                values = [load(builder, row, kind, LANES)]
            else:
                places = [at(builder, row, (n, PAIR * size)) for n in range(wide // 2)]
                values = [half for place in places for half in loaded(builder, place, kind, paired)]
            for t in range(many):
                weight = load(builder, at(builder, weights, (t, stride), (loop.index, 4)), types.float32, 1)
                weight = broadcast(builder, weight)
                for total, value in zip(sums[t], values, strict=True):
                    multiply_add(builder, total, value, weight)
        for t in range(many):
            found = [builder.load(total) for total in sums[t]]
            if paired:
                found = [half for n in range(0, wide, 2) for half in side_by_side(builder, *found[n : n + 2])]
            for n, value in enumerate(found):
                place = at(builder, out, (t, out_stride), (n * LANES, 4))
                before = load(builder, place, types.float32, LANES)
                store(builder, builder.fadd(before, value, flags=FUSE), place)

    return types.void(tag, count, blocks, *[types.int64] * 8), generate


def side_by_side(builder: Any, even: Any, odd: Any) -> list[Any]:
    """What `even_and_odd` took apart."""
    order = [n // 2 + LANES * (n % 2) for n in range(PAIR)]
    return [builder.shuffle_vector(even, odd, indices(*order[n : n + LANES])) for n in (0, LANES)]
