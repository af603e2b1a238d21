"""Products of a few tokens with sixteen rows of a weight abreast, whose numbers lie in the order of reading.

A vector holds one input of every row, or two as pairs of bfloat16. It is multiplied by an input that all lanes share:
no lanes are ever added up and no row ends before its block, so that almost every instruction reads or multiplies, and
the processor follows the one stream of addresses as fast as it reads. `ops/_weights.abreast` lays a weight out so.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import njit, types

from taut.ops._numba.caches import even_and_odd
from taut.ops._numba.rows import LINE, further, of_a_pair, prefetch, tree
from taut.ops._numba.scalar import FLOAT, JIT, array, intrinsic, splat
from taut.ops._numba.simd import (
    BITS,
    FUSE,
    LANES,
    WORD,
    at,
    broadcast,
    load,
    multiply_add,
    rolled,
    store,
    upto,
    zeros,
)
from taut.ops._weights import INPUTS

HALF = LANES // 2
"""Lanes where next to nothing but reading is done: processors follow loads of half a line faster than of whole ones."""
SPAN = 64
"""Rounds after which sums are added to a total: a long sum loses digits."""
FEW = 3
"""Tokens for which every second line is asked for: who multiplies by more reads on too late to be given the rest."""


@intrinsic(prefer_literal=True)
def block(_typing, tag, tokens, w, stop, after, x, x_stride, k, out, out_stride):
    """out[t, j] = (row j of sixteen at w) . x[t] for a constant number of `tokens`; k is a multiple of INPUTS.

    x is float32. A round takes INPUTS numbers of it, each of which has sums of its own. Asks meanwhile for the memory
    that follows, as `tile` of rows.py.
    """
    many, kind = tokens.literal_value, types.unliteral(tag)
    number = BITS[kind] // 8
    lanes = HALF if many == 1 and kind == types.float32 else LANES
    parts = range(0, LANES, lanes)

    def inputs_at(builder: Any, place: Any) -> list[list[Any]]:
        """The values of each input of a round, in vectors of `lanes` rows."""
        places = [at(builder, place, (n, LANES * number)) for n in range(INPUTS)]
        if kind == types.uint16:
            return [[value] for pair in places[::2] for value in even_and_odd(builder, pair)]
        return [[load(builder, at(builder, one, (part, number)), kind, lanes) for part in parts] for one in places]

    def generate(context, builder, _signature, args):
        _, _, w, stop, after, x, x_stride, k, out, out_stride = args
        vector, size = ir.VectorType(FLOAT, lanes), INPUTS * LANES * number
        sums = [[zeros(builder, vector, len(parts)) for _ in range(INPUTS)] for _ in range(many)]
        totals = [zeros(builder, vector, len(parts)) for _ in range(many)]
        tokens_at = [at(builder, x, (t, x_stride)) for t in range(many)]
        ahead, rounds = further(builder, w, stop, after), builder.sdiv(k, ir.Constant(WORD, INPUTS))

        def add(turn: Any) -> None:
            soon = of_a_pair(builder, at(builder, ahead, (turn, size)))
            prefetch(builder, soon, size // LINE, every=2 if many <= FEW else 1)
            found = inputs_at(builder, at(builder, w, (turn, size)))
            for place, chains in zip(tokens_at, sums, strict=True):
                for n, (values, into) in enumerate(zip(found, chains, strict=True)):
                    one = load(builder, at(builder, place, (turn, 4 * INPUTS), (n, 4)), types.float32, 1)
                    for value, total in zip(values, into, strict=True):
                        multiply_add(builder, total, value, broadcast(builder, one, lanes))

        def collect() -> None:
            for chains, into in zip(sums, totals, strict=True):
                for part, total in zip(zip(*chains, strict=True), into, strict=True):
                    found = tree(builder, [builder.load(chain) for chain in part])
                    builder.store(builder.fadd(builder.load(total), found, flags=FUSE), total)
                    for chain in part:
                        builder.store(splat(vector, 0.0), chain)

        span = ir.Constant(WORD, SPAN)
        with upto(builder, ir.Constant(WORD, 0), builder.sdiv(at(builder, rounds, (SPAN - 1, 1)), span)) as loop:
            first = builder.mul(loop.index, span)
            last = at(builder, first, (SPAN, 1))
            last = builder.select(builder.icmp_signed("<", last, rounds), last, rounds)
            with rolled(builder, first, last) as turn:
                add(turn)
            collect()
        for t, into in enumerate(totals):
            for part, total in zip(parts, into, strict=True):
                store(builder, builder.load(total), at(builder, out, (t, out_stride), (part, 4)))
        return context.get_dummy_value()

    return types.void(tag, tokens, *[types.int64] * 8), generate


@njit(**JIT)
def whole(k):
    """The inputs of a row abreast, with those that fill up its last round."""
    return (k + INPUTS - 1) // INPUTS * INPUTS


@njit(**JIT)
def abreast(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    """`products` for rows from a multiple of sixteen on; writes whole blocks of them."""
    k = whole(k)
    size = k * array(w, 1, tag).itemsize
    stop = w + (last + LANES - 1) // LANES * LANES * size
    for row in range(first, last, LANES):
        here, seen, to, left = w + row * size, x, out + 4 * (row - first), tokens
        while left >= 6:
            block(tag, 6, here, stop, after, seen, x_stride, k, to, out_stride)
            seen, to, left = seen + 6 * x_stride, to + 6 * out_stride, left - 6
        if left == 5:
            block(tag, 5, here, stop, after, seen, x_stride, k, to, out_stride)
        elif left == 4:
            block(tag, 4, here, stop, after, seen, x_stride, k, to, out_stride)
        elif left == 3:
            block(tag, 3, here, stop, after, seen, x_stride, k, to, out_stride)
        elif left == 2:
            block(tag, 2, here, stop, after, seen, x_stride, k, to, out_stride)
        elif left == 1:
            block(tag, 1, here, stop, after, seen, x_stride, k, to, out_stride)
