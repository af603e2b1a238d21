"""Products of a few tokens with sixteen rows of a weight abreast, whose numbers lie in the order of reading.

A vector holds one input of every row, or two as pairs of bfloat16. It is multiplied by an input that all lanes share:
no lanes are ever added up and no row ends before its block, so that almost every instruction reads or multiplies, and
the processor follows the streams of addresses as fast as it reads. `ops/_laid` lays a weight out so.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
from llvmlite import ir
from numba import types

from taut.ops._numba.caches import even_and_odd
from taut.ops._numba.compressed import (
    NUMBERS,
    STORED,
    add_exceptions,
    exceptions,
    head_of,
    size_of_round,
    widened,
)
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
    loads_follow,
    multiply_add,
    rolled,
    store,
    zeros,
)
from taut.ops._weights import INPUTS

STREAMS = 4
"""Blocks far apart that are read side by side: the hardware follows several streams, each a little way ahead, until it
comes to their end."""
SPAN, CHAINS = 64, 4 if ROOMY else 1
"""Rounds after which sums are added to a total, since a long sum loses digits, and sums of a product."""
PAIRED = 4
"""Tokens up to which, where registers are few, two by two are multiplied with two blocks at a time. More, and several
where registers are many, read one stream."""
TOKENS = 6
"""Tokens at a time."""
Pairs = Iterator[tuple[int, int, list[Any], list[Any]]]
"""(token, row, a few inputs of the token, the same of the row), a row being what a register holds."""


def bytes_a_round(kind: types.Type) -> int:
    """Of INPUTS inputs of a block."""
    return size_of_round(STORED[kind]) if kind in STORED else NUMBERS * BITS[kind] // 8


def inputs_at_once(kind: types.Type) -> int:
    """How many inputs are taken together: pairs of bfloat16, and whole rounds of what is compressed."""
    if kind in STORED:
        return INPUTS
    return 2 if kind == types.uint16 else 1


@intrinsic
def round_of(_typing, tag):
    """`bytes_a_round` of a tag."""
    return types.int64(tag), lambda *_: ir.Constant(WORD, bytes_a_round(tag))


@intrinsic(prefer_literal=True)
def turn(_typing, tag, blocks, tokens, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride):
    """out[t, b, j] += (row j of block b) . x[t] for a constant number of blocks and `tokens`, and so many rounds.

    Blocks are `apart` bytes from each other and begin at `heads`, their rounds at w; their products are `out_apart`; x
    is float32. A round takes INPUTS numbers of it. Asks meanwhile for the memory that follows: for one token in each
    stream, for more as `tile` of rows.py.
    """
    wide, many, kind = blocks.literal_value, tokens.literal_value, types.unliteral(tag)
    parts = range(LANES // WIDTH)
    step, size = inputs_at_once(kind), bytes_a_round(kind)

    def inputs_at(builder: Any, place: Any) -> list[Any]:
        """`step` inputs of the rows that a register holds."""
        return even_and_odd(builder, place) if step == 2 else [load(builder, place, kind, WIDTH)]

    def shared_at(builder: Any, place: Any) -> list[Any]:
        """`step` inputs of a token, each in all lanes."""
        ones = [load(builder, at(builder, place, (i, 4)), types.float32, 1) for i in range(step)]
        return [broadcast(builder, one, WIDTH) for one in ones]

    def pairs(builder: Any, inputs: list[Any], begins: list[Any]) -> Pairs:
        """For each of a few tokens with each row, or for all rows with each token."""
        rows = [at(builder, begin, (part, step * WIDTH * BITS[kind] // 8)) for begin, part in product(begins, parts)]
        if many < len(rows):
            seen = [shared_at(builder, place) for place in inputs]
            for j, place in enumerate(rows):
                loads_follow(builder)
                values = inputs_at(builder, place)
                yield from ((t, j, x, values) for t, x in enumerate(seen))
        else:
            found = [inputs_at(builder, place) for place in rows]
            for t, place in enumerate(inputs):
                x = shared_at(builder, place)
                yield from ((t, j, x, values) for j, values in enumerate(found))

    def whole_rounds(builder: Any, inputs: list[Any], begins: list[Any], heads: list[Any]) -> Pairs:
        """For each block, whose numbers take many registers, all tokens."""
        for b, (place, head) in enumerate(zip(begins, heads, strict=True)):
            loads_follow(builder)
            seen = [shared_at(builder, x_at) for x_at in inputs] if many == 1 else []
            for part, values in enumerate(widened(builder, kind, place, head)):
                for t, x_at in enumerate(inputs):
                    x = seen[t] if seen else shared_at(builder, x_at)
                    yield t, b * len(parts) + part, x, values

    def generate(context, builder, _signature, args):
        _, _, _, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride = args
        vector, lines = ir.VectorType(FLOAT, WIDTH), -(-size // LINE)
        sums = [[zeros(builder, vector, CHAINS) for _ in range(wide * len(parts))] for _ in range(many)]
        begins, tables = ([at(builder, first, (b, apart)) for b in range(wide)] for first in (w, heads))
        tokens_at = [at(builder, x, (t, x_stride)) for t in range(many)]
        ahead = further(builder, w, stop, after)
        with rolled(builder, ir.Constant(WORD, 0), rounds) as index:
            here = [at(builder, begin, (index, size)) for begin in begins]
            if many == 1:
                for place in here:
                    ask_near(builder, kind, place, lines)
            elif ROOMY:  # by pairs: of int8, whose rounds are lines, every second one
                prefetch(builder, of_a_pair(builder, at(builder, ahead, (index, size))), lines)
            for n in range(0, INPUTS, step):
                inputs = [at(builder, place, (index, 4 * INPUTS), (n, 4)) for place in tokens_at]
                places = [at(builder, place, (n, size // INPUTS)) for place in here]
                both = pairs(builder, inputs, places) if step < INPUTS else whole_rounds(builder, inputs, here, tables)
                for t, j, x, values in both:
                    for i in range(step):
                        multiply_add(builder, sums[t][j][(n + i) % CHAINS], values[i], x[i])
        for t, into in enumerate(sums):
            for (b, part), chains in zip(product(range(wide), parts), into, strict=True):
                place = at(builder, out, (t, out_stride), (b, out_apart), (part, 4 * WIDTH))
                sum_ = tree(builder, [builder.load(chain) for chain in chains])
                store(builder, builder.fadd(load(builder, place, types.float32, WIDTH), sum_, flags=FUSE), place)
        return context.get_dummy_value()

    return types.void(tag, blocks, tokens, *[types.int64] * 11), generate


@jit
def streams_of(tokens):
    """How many blocks are read side by side for so many tokens."""
    if tokens == 1:
        return STREAMS
    return 2 if tokens <= PAIRED and not ROOMY else 1


@jit
def asks_ahead(tokens):
    """Whether a product of so many tokens reads one stream and asks for what follows, rather than several streams."""
    return ROOMY and tokens > 1


@jit
def whole(k):
    """The inputs of a row abreast, with those that fill up its last round."""
    return (k + INPUTS - 1) // INPUTS * INPUTS


@jit
def size_of_block(w, k, tag):
    """Bytes of sixteen rows of the weight that begins at w."""
    return head_of(tag) + whole(k) // INPUTS * round_of(tag) + exceptions(w, tag)


@jit
def abreast(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    """`products` for rows from a multiple of sixteen on; writes whole blocks of them."""
    rounds, blocks = whole(k) // INPUTS, (last - first + LANES - 1) // LANES
    head, size, rest, block = head_of(tag), round_of(tag), exceptions(w, tag), size_of_block(w, k, tag)
    begin = w + first // LANES * block
    stop = begin + blocks * block
    for t in range(tokens):
        array(out + t * out_stride, blocks * LANES, np.float32(0))[:] = 0
    streams = streams_of(tokens)
    apart = (blocks + streams - 1) // streams
    for low in range(apart):
        side_by_side, at_first = (blocks - low + apart - 1) // apart, begin + low * block
        for start in range(0, rounds, SPAN):
            here, seen = at_first + head + start * size, x + start * 4 * INPUTS
            turns(side_by_side, tokens, here, apart * block, at_first, stop, after, seen, x_stride,
                  min(SPAN, rounds - start), out + low * 4 * LANES, apart * 4 * LANES, out_stride, tag)  # fmt: skip
        if rest:
            for b in range(low, blocks, apart):
                end = begin + (b + 1) * block
                add_exceptions(end - rest, end, x, x_stride, tokens, out + b * 4 * LANES, out_stride)


@jit
def turns(blocks, tokens, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride, tag):
    """`turn` for the blocks of up to STREAMS streams and any number of tokens."""
    if blocks == 4:
        turn(tag, 4, 1, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride)
    elif blocks == 3:
        turn(tag, 3, 1, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride)
    elif blocks == 2:
        while tokens >= 2:
            turn(tag, 2, 2, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride)
            x, out, tokens = x + 2 * x_stride, out + 2 * out_stride, tokens - 2
        if tokens:
            turn(tag, 2, 1, w, apart, heads, stop, after, x, x_stride, rounds, out, out_apart, out_stride)
    else:
        block_turns(tokens, w, heads, stop, after, x, x_stride, rounds, out, out_stride, tag)


@jit
def block_turns(tokens, w, heads, stop, after, x, x_stride, rounds, out, out_stride, tag):
    """`turn` of one block for any number of tokens."""
    while tokens >= TOKENS:
        turn(tag, 1, TOKENS, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
        x, out, tokens = x + TOKENS * x_stride, out + TOKENS * out_stride, tokens - TOKENS
    if tokens == 5:
        turn(tag, 1, 5, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
    elif tokens == 4:
        turn(tag, 1, 4, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
    elif tokens == 3:
        turn(tag, 1, 3, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
    elif tokens == 2:
        turn(tag, 1, 2, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
    elif tokens == 1:
        turn(tag, 1, 1, w, 0, heads, stop, after, x, x_stride, rounds, out, 0, out_stride)
