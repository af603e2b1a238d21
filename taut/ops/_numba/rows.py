"""Products of a few tokens with the rows of a weight of floats or int8: every row is read once, in order.

For one token four rows that lie far apart are read side by side: memory is read fastest as several streams. For more
tokens, whose sums would need more registers than there are, one row is finished before the next one is begun. Vectors
of 16 lanes collect each product in an order that depends on nothing but its length, and are added in a fixed tree: a
product does not depend on the tile, the batch or the thread it came from.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.core import cgutils

from taut.ops._numba.kernels import jit
from taut.ops._numba.scalar import FLOAT, INT32, array, call, intrinsic, splat, widen
from taut.ops._numba.simd import (
    BITS,
    FUSE,
    LANES,
    ROOMY,
    VECTOR,
    WORD,
    at,
    load,
    multiply_add,
    rolled,
    store,
    totals,
    upto,
    zeros,
)

ROWS, CHAINS, STEP = 4, 2 if ROOMY else 1, 64
"""Rows of a tile, vectors in which a product is collected by turns, and inputs for which memory is asked at once."""
AHEAD, NEAR, LINE = 12288, 1024 if ROOMY else 384, 64
"""How far ahead to ask for memory, in bytes, of one stream, which the hardware alone loses at the end of every page,
and of several; and the bytes of a line."""
READ, SECOND_LEVEL, DATA = 0, 2, 1
"""Arguments of LLVM's prefetch."""
MANY = 4
"""Tokens from which on four rows are multiplied at once."""

Products = list[list[Any]]


def indices(*numbers: int) -> ir.Constant:
    return ir.Constant(ir.VectorType(INT32, len(numbers)), [ir.Constant(INT32, n) for n in numbers])


def stored_type(tag: types.Type) -> ir.Type:
    return FLOAT if tag == types.float32 else ir.IntType(BITS[tag])


def load_first(builder: Any, address: Any, kind: ir.Type, lanes: int, count: Any) -> Any:
    """A vector of the first `count` values at an address, and zeros."""
    vector, words = ir.VectorType(kind, lanes), ir.VectorType(INT32, lanes)
    many = builder.insert_element(ir.Constant(words, ir.Undefined), builder.trunc(count, INT32), ir.Constant(INT32, 0))
    many = builder.shuffle_vector(many, ir.Constant(words, ir.Undefined), splat(words, 0))
    seen = builder.icmp_signed("<", indices(*range(lanes)), many)
    bits = 32 if kind == FLOAT else int(str(kind).removeprefix("i"))
    name = f"llvm.masked.load.v{lanes}{'f' if kind == FLOAT else 'i'}{bits}.p0"
    place = builder.inttoptr(address, vector.as_pointer())
    return call(builder, name, vector, place, ir.Constant(INT32, bits // 8), seen, ir.Constant(vector, None))


def prefetch(builder: Any, address: Any, count: int, every: int = 1) -> None:
    """Ask for `count` cache lines, or every second of them, into the second level: the first waits for far fewer."""
    place = ir.IntType(8).as_pointer()
    how = [ir.Constant(INT32, n) for n in (READ, SECOND_LEVEL, DATA)]
    for line in range(0, count, every):
        line_at = builder.inttoptr(at(builder, address, (1, LINE * line)), place)
        call(builder, "llvm.prefetch.p0", ir.VoidType(), line_at, *how)


def ask(builder: Any, tag: types.Type, place: Any, count: int) -> None:
    """Ask for lines of one of several streams where that serves.

    Registers of AVX2 take float32 in so few instructions that the processor looks far enough ahead without.
    """
    if ROOMY or tag != types.float32:
        prefetch(builder, place, count)


def ask_near(builder: Any, tag: types.Type, place: Any, count: int) -> None:
    """The same, for those that follow a place a little way ahead."""
    ask(builder, tag, at(builder, place, (1, NEAR)), count)


def further(builder: Any, place: Any, stop: Any, after: Any) -> Any:
    """AHEAD bytes on from a place, where reading goes on at `after` when it has come to `stop`."""
    ahead = at(builder, place, (1, AHEAD))
    beyond = builder.add(after, builder.sub(ahead, stop))
    return builder.select(builder.icmp_signed("<", ahead, stop), ahead, beyond)


def of_a_pair(builder: Any, address: Any) -> Any:
    """The first line of the pair that an address lies in; who asks for it is given the second, not the other way."""
    return builder.and_(address, ir.Constant(WORD, -2 * LINE))


@intrinsic
def fetch(_typing, address, size):
    """Ask for `size` bytes of memory from an address on, by every second line."""

    def generate(context, builder, _signature, args):
        address, size = args
        prefetch_range(builder, of_a_pair(builder, address), size, 2 * LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


@intrinsic
def fetch_all(_typing, address, size):
    """The same, by every line."""

    def generate(context, builder, _signature, args):
        address, size = args
        prefetch_range(builder, address, size, LINE)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64), generate


def prefetch_range(builder: Any, address: Any, size: Any, apart: int) -> None:
    """Ask for lines that are so many bytes apart."""
    with upto(builder, ir.Constant(WORD, 0), builder.sdiv(size, ir.Constant(WORD, apart))) as loop:
        prefetch(builder, at(builder, address, (loop.index, apart)), 1)


def walk(builder: Any, k: Any, step: int, block: Callable[[Any, Any | None], None]) -> None:
    """block(start, None) for every whole step of k, and block(start, count) for a rest of `count`."""
    zero, whole = ir.Constant(WORD, 0), builder.sdiv(k, ir.Constant(WORD, step))
    with upto(builder, zero, whole) as loop:
        block(builder.mul(loop.index, ir.Constant(WORD, step)), None)
    start = builder.mul(whole, ir.Constant(WORD, step))
    rest = builder.sub(k, start)
    with builder.if_then(builder.icmp_signed(">", rest, zero)):
        block(start, rest)


def tree(builder: Any, values: list[Any]) -> Any:
    while len(values) > 1:
        values = [builder.fadd(a, b, flags=FUSE) for a, b in zip(values[::2], values[1::2], strict=True)]
    return values[0]


def dense_products(
    builder: Any, tag: types.Type, rows: list[Any], inputs: list[Any], ahead: Any | None, k: Any
) -> Products:
    """For every row and token a vector whose lanes add up to their product.

    Asks for memory from `ahead` on or, without it, for what follows in each row, by `ask_near`.
    """
    size, kind = BITS[tag] // 8, stored_type(tag)
    sums = [[zeros(builder, VECTOR, CHAINS) for _ in inputs] for _ in rows]
    # Where nothing but reading binds, few instructions may read: the hardware knows a stream by them.
    at_once = CHAINS * LANES if tag == types.float32 and len(inputs) == 1 else STEP

    def add(start: Any, chain: int, values: list[Any]) -> None:
        for t, x in enumerate(inputs):
            seen = load(builder, at(builder, x, (start, 4)), types.float32, LANES)
            for row, value in zip(sums, values, strict=True):
                multiply_add(builder, row[t][chain], value, seen)

    def ask_after(start: Any) -> None:
        if ahead is None:
            for row in rows:
                ask_near(builder, tag, at(builder, row, (start, size)), STEP * size // LINE)
            return
        soon, lines = at(builder, ahead, (start, size * len(rows))), STEP * size * len(rows) // LINE
        if size == 1 or len(rows) > 1:  # read in more parts, or more streams, than the hardware follows
            prefetch(builder, soon, lines)
        else:
            prefetch(builder, of_a_pair(builder, soon), lines, every=2)

    def rest(start: Any, count: Any) -> None:
        for n in range(0, STEP, LANES):
            with builder.if_then(builder.icmp_signed(">", count, ir.Constant(WORD, n))):
                here, left = at(builder, start, (n, 1)), builder.sub(count, ir.Constant(WORD, n))
                some = [load_first(builder, at(builder, row, (here, size)), kind, LANES, left) for row in rows]
                add(here, n // LANES % CHAINS, [widen(builder, values, tag) for values in some])

    def block(start: Any, count: Any | None) -> None:
        ask_after(start)
        if count is not None:
            return rest(start, count)
        with rolled(builder, start, at(builder, start, (STEP, 1)), at_once) as these:
            for n in range(0, at_once, LANES):
                here = at(builder, these, (n, 1))
                places = [at(builder, row, (here, size)) for row in rows]
                add(here, n // LANES % CHAINS, [load(builder, place, tag, LANES) for place in places])

    walk(builder, k, STEP, block)
    return [[tree(builder, [builder.load(chain) for chain in chains]) for chains in row] for row in sums]


def put_sums(builder: Any, found: Products, out: Any, stride: Any, rows: Any) -> None:
    """out[t, j] = the sum of the lanes of found[j][t], for the first `rows` j of ROWS."""
    tokens = len(found[0])
    vectors = [row[t] for t in range(tokens) for row in found]
    sums = totals(builder, vectors + [splat(VECTOR, 0.0)] * (LANES - len(vectors)))
    whole = builder.icmp_signed("==", rows, ir.Constant(WORD, ROWS))
    for t in range(tokens):
        place, lanes = at(builder, out, (t, stride)), range(ROWS * t, ROWS * (t + 1))
        with builder.if_else(whole) as (all_of_them, some):
            with all_of_them:
                store(builder, builder.shuffle_vector(sums, sums, indices(*lanes)), place)
            with some:
                for j, lane in enumerate(lanes):
                    with builder.if_then(builder.icmp_signed("<", ir.Constant(WORD, j), rows)):
                        value = builder.extract_element(sums, ir.Constant(INT32, lane))
                        store(builder, value, at(builder, place, (j, 4)))


def put_products(
    builder: Any, abreast: int, tokens: int, rows: Any, products: Callable[[list[Any]], Products], out: Any, stride: Any
) -> None:
    """out[t, j] from products([j]) one row after the other, or from those of all ROWS at once where `abreast`."""
    if abreast == ROWS:
        return put_sums(builder, products([ir.Constant(WORD, j) for j in range(ROWS)]), out, stride, rows)
    kept = [cgutils.alloca_once(builder, VECTOR, ROWS) for _ in range(tokens)]
    for place in kept:
        for j in range(ROWS):
            builder.store(splat(VECTOR, 0.0), builder.gep(place, [ir.Constant(WORD, j)]))
    with rolled(builder, ir.Constant(WORD, 0), rows) as row:
        for place, vector in zip(kept, products([row])[0], strict=True):
            builder.store(vector, builder.gep(place, [row]))
    found = [[builder.load(builder.gep(place, [ir.Constant(WORD, j)])) for place in kept] for j in range(ROWS)]
    put_sums(builder, found, out, stride, rows)


@intrinsic(prefer_literal=True)
def tile(_typing, tag, abreast, tokens, rows, w, w_stride, stop, after, x, x_stride, k, out, out_stride):
    """out[t, j] = w[j] . x[t] for at most four `rows` and a constant number of `tokens`.

    `abreast` is 1 to finish one row before the next, or 4 to read an input once for all of exactly four. x is float32,
    padded to 16 with zeros. Asks meanwhile for the memory that follows: AHEAD bytes on, and from `after` on where that
    lies beyond `stop`.
    """
    many, kind = tokens.literal_value, types.unliteral(tag)

    def generate(_context, builder, _signature, args):
        _, _, _, rows, w, w_stride, stop, after, x, x_stride, k, out, out_stride = args
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]

        def products(numbers: list[Any]) -> Products:
            taken = [at(builder, w, (j, w_stride)) for j in numbers]
            return dense_products(builder, kind, taken, inputs, further(builder, taken[0], stop, after), k)

        put_products(builder, abreast.literal_value, many, rows, products, out, out_stride)

    return types.void(tag, abreast, tokens, *[types.int64] * 10), generate


@intrinsic
def streams(_typing, tag, w, w_stride, x, k, out, out_stride):
    """out[j] = w[j] . x for ROWS rows that lie far apart, and outputs: so many streams, which the hardware follows."""
    kind = types.unliteral(tag)

    def generate(context, builder, _signature, args):
        _, w, w_stride, x, k, out, out_stride = args
        found = dense_products(builder, kind, [at(builder, w, (j, w_stride)) for j in range(ROWS)], [x], None, k)
        sums = totals(builder, [row[0] for row in found])
        for j in range(ROWS):
            value = builder.extract_element(sums, ir.Constant(INT32, j))
            store(builder, value, at(builder, out, (j, out_stride)))
        return context.get_dummy_value()

    return types.void(tag, *[types.int64] * 6), generate


@jit
def tiles(rows, w, w_stride, stop, after, x, x_stride, tokens, k, out, out_stride, tag):
    """At most four rows by any number of tokens; many tokens are bound by arithmetic, a few by reading the weight."""
    t = 0
    while t + 2 <= tokens:
        seen, to = x + t * x_stride, out + t * out_stride
        if rows == ROWS and tokens >= MANY:
            tile(tag, ROWS, 2, rows, w, w_stride, stop, after, seen, x_stride, k, to, out_stride)
        else:
            tile(tag, 1, 2, rows, w, w_stride, stop, after, seen, x_stride, k, to, out_stride)
        t += 2
    if t < tokens:
        tile(tag, 1, 1, rows, w, w_stride, stop, after, x + t * x_stride, x_stride, k, out + t * out_stride, out_stride)


@jit
def dense(w, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    size = k * array(w, 1, tag).itemsize
    stop = w + last * size
    apart = (last - first) // ROWS if tokens == 1 else 0
    for row in range(first, first + apart):
        streams(tag, w + row * size, apart * size, x, k, out + 4 * (row - first), 4 * apart)
    for row in range(first + ROWS * apart, last, ROWS):
        rows, to = min(ROWS, last - row), out + 4 * (row - first)
        tiles(rows, w + row * size, size, stop, after, x, x_stride, tokens, k, to, out_stride, tag)
