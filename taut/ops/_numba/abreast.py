"""Products of a few tokens with sixteen rows of a weight abreast, whose numbers lie in the order of reading.

A vector holds one input of every row, or two as pairs of bfloat16. It is multiplied by an input that all lanes share:
no lanes are ever added up and no row ends before its block, so that almost every instruction reads or multiplies, and
the processor follows the streams of addresses as fast as it reads. `ops/_weights.abreast` lays a weight out so.
"""

from __future__ import annotations

from itertools import product
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from taut.ops._numba.caches import even_and_odd
from taut.ops._numba.kernels import jit
from taut.ops._numba.rows import LINE, ask_near, further, of_a_pair, prefetch, tree
from taut.ops._numba.scalar import FLOAT, array, intrinsic
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
    zeros,
)
from taut.ops._weights import INPUTS

STREAMS = 4
"""Blocks that are read side by side: the hardware follows several streams, each a little way ahead. With many registers
several tokens read one stream and ask far ahead of it."""
SPAN, CHAINS = (64, 4) if ROOMY else (8, 1)
"""Rounds after which sums are added to a total, since a long sum loses digits and other streams wait, and sums of a
product."""
TOKENS, FEW = 6, 3
"""Tokens at a time, and those for which every second line is asked for: who multiplies by more reads on too late to be
given the rest."""


@intrinsic(prefer_literal=True)
def turn(_typing, tag, blocks, tokens, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride):
    """out[t, 16 b + j] += (row j of block b) . x[t] for a constant number of blocks and `tokens`, and so many rounds.

    Blocks are `w_stride` bytes apart; x is float32. A round takes INPUTS numbers of it. Asks meanwhile for the memory
    that follows, as `tile` of rows.py, where that serves.
    """
    wide, many, kind = blocks.literal_value, tokens.literal_value, types.unliteral(tag)
    number = BITS[kind] // 8
    parts = list(product(range(wide), range(0, LANES, WIDTH)))

    def inputs_at(builder: Any, place: Any) -> list[Any]:
        """Each input of a round, of the rows that a register holds."""
        places = [at(builder, place, (n, LANES * number)) for n in range(INPUTS)]
        if kind == types.uint16:
            return [value for pair in places[::2] for value in even_and_odd(builder, pair)]
        return [load(builder, one, kind, WIDTH) for one in places]

    def generate(context, builder, _signature, args):
        _, _, _, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride = args
        vector, size = ir.VectorType(FLOAT, WIDTH), INPUTS * LANES * number
        sums = [[zeros(builder, vector, CHAINS) for _ in parts] for _ in range(many)]
        step = number if kind != types.uint16 else 2 * number
        begin = [at(builder, w, (b, w_stride), (part, step)) for b, part in parts]
        tokens_at = [at(builder, x, (t, x_stride)) for t in range(many)]
        ahead = further(builder, w, stop, after)
        with rolled(builder, ir.Constant(WORD, 0), rounds) as index:
            if many == 1:
                for place in begin[:: LANES // WIDTH]:
                    ask_near(builder, at(builder, place, (index, size)), size // LINE)
            elif ROOMY:
                soon = of_a_pair(builder, at(builder, ahead, (index, size)))
                prefetch(builder, soon, size // LINE, every=2 if many <= FEW else 1)
            found = [inputs_at(builder, at(builder, place, (index, size))) for place in begin]
            for n, values in enumerate(zip(*found, strict=True)):
                for place, into in zip(tokens_at, sums, strict=True):
                    one = load(builder, at(builder, place, (index, 4 * INPUTS), (n, 4)), types.float32, 1)
                    for value, chains in zip(values, into, strict=True):
                        multiply_add(builder, chains[n % CHAINS], value, broadcast(builder, one, WIDTH))
        for t, into in enumerate(sums):
            for (b, part), chains in zip(parts, into, strict=True):
                place = at(builder, out, (t, out_stride), (b * LANES + part, 4))
                sum_ = tree(builder, [builder.load(chain) for chain in chains])
                store(builder, builder.fadd(load(builder, place, types.float32, WIDTH), sum_, flags=FUSE), place)
        return context.get_dummy_value()

    return types.void(tag, blocks, tokens, *[types.int64] * 9), generate


@jit
def asks_ahead(tokens):
    """Whether a product of so many tokens reads one stream and asks for what follows, rather than several streams."""
    return ROOMY and tokens > 1


@jit
def whole(k):
    """The inputs of a row abreast, with those that fill up its last round."""
    return (k + INPUTS - 1) // INPUTS * INPUTS


@jit
def abreast(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    """`products` for rows from a multiple of sixteen on; writes whole blocks of them."""
    rounds, blocks = whole(k) // INPUTS, (last - first + LANES - 1) // LANES
    size = INPUTS * LANES * array(w, 1, tag).itemsize
    begin = w + first // LANES * rounds * size
    stop = begin + blocks * rounds * size
    for t in range(tokens):
        array(out + t * out_stride, blocks * LANES, np.float32(0))[:] = 0
    streams = 1 if asks_ahead(tokens) else STREAMS
    for low in range(0, blocks, streams):
        high = min(low + streams, blocks)
        for start in range(0, rounds, SPAN):
            here, seen = begin + (low * rounds + start) * size, x + start * 4 * INPUTS
            turns(here, rounds * size, high - low, stop, after, seen, x_stride, tokens, min(SPAN, rounds - start),
                  out + low * 4 * LANES, out_stride, tag)  # fmt: skip


@jit
def turns(w, w_stride, blocks, stop, after, x, x_stride, tokens, rounds, out, out_stride, tag):
    """`turn` for up to STREAMS blocks and any number of tokens."""
    if tokens == 1 and blocks == STREAMS:
        return turn(tag, STREAMS, 1, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
    while tokens == 2 and blocks >= 2:
        turn(tag, 2, 2, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
        w, out, blocks = w + 2 * w_stride, out + 8 * LANES, blocks - 2
    for b in range(blocks):
        to = out + b * 4 * LANES
        block_turns(w + b * w_stride, w_stride, stop, after, x, x_stride, tokens, rounds, to, out_stride, tag)


@jit
def block_turns(w, w_stride, stop, after, x, x_stride, tokens, rounds, out, out_stride, tag):
    """`turn` of one block for any number of tokens."""
    while tokens >= TOKENS:
        turn(tag, 1, TOKENS, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
        x, out, tokens = x + TOKENS * x_stride, out + TOKENS * out_stride, tokens - TOKENS
    if tokens == 5:
        turn(tag, 1, 5, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
    elif tokens == 4:
        turn(tag, 1, 4, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
    elif tokens == 3:
        turn(tag, 1, 3, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
    elif tokens == 2:
        turn(tag, 1, 2, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
    elif tokens == 1:
        turn(tag, 1, 1, w, w_stride, stop, after, x, x_stride, rounds, out, out_stride)
