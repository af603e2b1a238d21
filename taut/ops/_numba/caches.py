"""Inner loops of attention over rows of a cache, written as vectors.

Four rows that lie far apart are taken at a time, so that memory is read as four streams, as by `rows.streams`. bfloat16
is taken in pairs: the even and the odd ones of two registers, which costs two instructions instead of four.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba import types

from taut.ops._numba.rows import LINE, ask, indices, walk
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
    loads_follow,
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
"""Rows of the cache that are taken at a time, and streams of them."""
KEYS_AT_ONCE = {1: 4, 2: 4, 3: 4, 4: 4} if ROOMY else {1: 4, 2: 4, 3: 4, 4: 2}
"""Of a tile, by the number of queries: sums that leave registers for what is multiplied."""
FEATURES_AT_ONCE = {1: 64, 2: 64, 3: 64, 4: 64} if ROOMY else {1: 32, 2: 16, 3: 16, 4: 16}
"""The same of `blend`."""
DEEP = 16 if ROOMY else 1
"""Rows of each stream that `blend` adds up before it turns to other features of them: with few registers whole rows are
read one after the other, since half of them at a time are no stream."""


def in_pairs(tag: types.Type) -> bool:
    return tag == types.uint16


def even_and_odd(builder: Any, place: Any) -> list[Any]:
    """The even and the odd ones of two registers of bfloat16, as float32: two instructions instead of four."""
    words = ir.VectorType(INT32, WIDTH)
    both = builder.load(builder.inttoptr(place, words.as_pointer()), align=2)
    even, odd = builder.shl(both, splat(words, 16)), builder.and_(both, splat(words, -65536))
    return [builder.bitcast(part, VECTOR) for part in (even, odd)]


@intrinsic
def as_read(_typing, tag, source, to, rows, k):
    """Where `tile` finds rows of k float32 that it multiplies with those of a tag: at the source, or arranged."""

    def generate(_context, builder, _signature, args):
        _, source, to, rows, k = args
        if not in_pairs(tag):
            return source
        stride = builder.mul(k, ir.Constant(WORD, 4))
        rearrange(builder, source, to, stride, rows, k, lambda left, right: taken(builder, left, right, EVEN_AND_ODD))
        return to

    return types.int64(tag, *[types.int64] * 4), generate


@intrinsic
def as_written(_typing, tag, sums, stride, rows, k):
    """Put k features that `blend` added up over rows of a tag into their order, in rows `stride` bytes apart."""

    def generate(context, builder, _signature, args):
        _, sums, stride, rows, k = args
        if in_pairs(tag):
            rearrange(builder, sums, sums, stride, rows, k, lambda even, odd: taken(builder, even, odd, BY_TURNS))
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 4), generate


EVEN_AND_ODD = [list(range(start, PAIR, 2)) for start in (0, 1)]
BY_TURNS = [[n // 2 + WIDTH * (n % 2) for n in range(start, start + WIDTH)] for start in (0, WIDTH)]
"""Which lanes of two registers make two others: the even and the odd ones, and back again."""


def taken(builder: Any, a: Any, b: Any, order: list[list[int]]) -> list[Any]:
    return [builder.shuffle_vector(a, b, indices(*lanes)) for lanes in order]


def rearrange(builder: Any, source: Any, to: Any, stride: Any, rows: Any, k: Any, change: Callable[..., Any]) -> None:
    """Write k float32 of each row with every two registers changed; a rest of one register stays."""
    with upto(builder, ir.Constant(WORD, 0), rows) as row:
        here, there = (at(builder, base, (row.index, stride)) for base in (source, to))

        def block(start: Any, rest: Any | None) -> None:
            places = [at(builder, here, (start, 4), (n, 4 * WIDTH)) for n in range(2 if rest is None else 1)]
            values = [load(builder, place, types.float32, WIDTH) for place in places]
            for n, value in enumerate(change(*values) if rest is None else values):
                store(builder, value, at(builder, there, (start, 4), (n, 4 * WIDTH)))

        walk(builder, k, PAIR, block)


@intrinsic(prefer_literal=True)
def tile(_typing, tag, count, x, x_stride, rows, apart, k, out, out_stride, soon, soon_apart):
    """out[t, j] = x[t] . rows[j] for four rows and t below a constant `count` of at most 4; k is a multiple of 16.

    The rows are `apart` bytes from each other. x is arranged by `as_read`. Asks for four rows from `soon` on.
    """
    many, kind = count.literal_value, types.unliteral(tag)
    at_once = KEYS_AT_ONCE[many]

    def generate(_context, builder, _signature, args):
        _, _, x, x_stride, rows, apart, k, out, out_stride, soon, soon_apart = args
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]
        for first in range(0, KEYS, at_once):
            four = range(first, first + at_once)
            begin, ahead = (
                [at(builder, at_, (j, by)) for j in four] for at_, by in ((rows, apart), (soon, soon_apart))
            )
            found = products(builder, kind, begin, ahead, inputs, k)
            for t in range(0, many, WIDTH // at_once):
                some = found[t : t + WIDTH // at_once]
                sums = totals(builder, [vector for vectors in some for vector in vectors])
                for n in range(len(some)):
                    own = builder.shuffle_vector(sums, sums, indices(*range(n * at_once, (n + 1) * at_once)))
                    store(builder, own, at(builder, out, (t + n, out_stride), (first, 4)))

    return types.void(tag, count, *[types.int64] * 9), generate


def products(
    builder: Any, tag: types.Type, rows: list[Any], ahead: list[Any], inputs: list[Any], k: Any
) -> list[list[Any]]:
    """For every input and row a vector whose lanes add up to their product. Asks for the rows `ahead` meanwhile."""
    size, sums = BITS[tag] // 8, [zeros(builder, VECTOR, len(rows)) for _ in inputs]

    def block(start: Any, rest: Any | None) -> None:
        count = 2 if rest is None else 1
        places = [at(builder, row, (start, size)) for row in rows]
        for row in ahead:
            ask(builder, tag, at(builder, row, (start, size)), max(count * WIDTH * size // LINE, 1))
        for n in range(count):
            values = [load(builder, at(builder, x, (start, 4), (n, 4 * WIDTH)), types.float32, WIDTH) for x in inputs]
            for j, place in enumerate(places):
                part = part_of(builder, place, tag, n, count)
                for total, value in zip(sums, values, strict=True):
                    multiply_add(builder, total[j], part, value)

    walk(builder, k, PAIR, block)
    return [[builder.load(total) for total in row] for row in sums]


def part_of(builder: Any, place: Any, tag: types.Type, n: int, count: int) -> Any:
    """The n-th of `count` vectors of stored values; of every two of bfloat16 the even ones, then the odd ones."""
    loads_follow(builder)
    if in_pairs(tag) and count % 2 == 0:
        return even_and_odd(builder, at(builder, place, (n // 2, 2 * PAIR)))[n % 2]
    return load(builder, at(builder, place, (n, WIDTH * BITS[tag] // 8)), tag, WIDTH)


@intrinsic(prefer_literal=True)
def blend(_typing, tag, count, weights, stride, rows, row_stride, apart, many_rows, features, out, out_stride,
          near, left, soon, soon_apart):  # fmt: skip
    """out[t] += sum over j of weights[t, j] rows[j], for t below a constant `count`, over four streams of `many_rows`.

    The streams of rows (of the tag's format, `row_stride` bytes from one to the next) begin `apart` bytes from each
    other. The weights (float32, `stride` bytes from one t to the next) are those of each stream's first row, then of
    each stream's second one, and so on. Takes a multiple of 16 features; `out` is float32 and left in the order that
    `as_written` undoes. Asks for the rows that come `near` rows later: each stream has `left` of them, and after those
    come others from `soon` on, in streams `soon_apart` bytes apart.
    """
    many, kind = count.literal_value, types.unliteral(tag)
    size = BITS[kind] // 8

    def generate(_context, builder, _signature, args):
        _, _, weights, stride, rows, row_stride, apart, many_rows, features, out, out_stride, *ahead = args
        near, left, soon, soon_apart = ahead

        def soon_at(row: Any, start: Any) -> list[Any]:
            then = builder.add(row, near)
            mine, later = builder.icmp_signed("<", then, left), builder.sub(then, left)
            base = builder.select(mine, at(builder, rows, (then, row_stride)), at(builder, soon, (later, row_stride)))
            by = builder.select(mine, apart, soon_apart)
            return [at(builder, base, (n, by), (start, size)) for n in range(KEYS)]

        def add_row(row: Any, start: Any, sums: list[list[Any]]) -> None:
            """One row of each stream."""
            places = [at(builder, rows, (row, row_stride), (n, apart), (start, size)) for n in range(KEYS)]
            for place in soon_at(row, start):
                ask(builder, kind, place, max(len(sums[0]) * WIDTH * size // LINE, 1))
            for n, place in enumerate(places):
                of = [at(builder, weights, (row, 4 * KEYS), (t, stride), (n, 4)) for t in range(many)]
                shares = [broadcast(builder, load(builder, one, types.float32, 1), WIDTH) for one in of]
                for i in range(len(sums[0])):
                    value = part_of(builder, place, kind, i, len(sums[0]))
                    for share, into in zip(shares, sums, strict=True):
                        multiply_add(builder, into[i], value, share)

        def block(first: Any, last: Any, start: Any, wide: int) -> None:
            """Rows of each stream from first to last, and so many vectors of features."""
            sums = [zeros(builder, VECTOR, wide) for _ in range(many)]
            with rolled(builder, first, last) as row:
                add_row(row, start, sums)
            for t, i in product(range(many), range(wide)):
                place = at(builder, out, (t, out_stride), (start, 4), (i, 4 * WIDTH))
                before, sum_ = load(builder, place, types.float32, WIDTH), builder.load(sums[t][i])
                store(builder, builder.fadd(before, sum_, flags=FUSE), place)

        with rolled(builder, ir.Constant(WORD, 0), many_rows, DEEP) as first:
            beyond, start = builder.add(first, ir.Constant(WORD, DEEP)), ir.Constant(WORD, 0)
            last = builder.select(builder.icmp_signed("<", beyond, many_rows), beyond, many_rows)
            for wide in sorted({FEATURES_AT_ONCE[many], PAIR, LANES}, reverse=True):
                end = builder.mul(builder.sdiv(features, ir.Constant(WORD, wide)), ir.Constant(WORD, wide))
                with rolled(builder, start, end, wide) as at_feature:
                    block(first, last, at_feature, wide // WIDTH)
                start = end

    return types.void(tag, count, *[types.int64] * 13), generate
