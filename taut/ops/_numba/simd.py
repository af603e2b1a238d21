"""Inner loops written as vectors: dot products with one row, and weighted sums of rows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from llvmlite import binding, ir
from numba import types
from numba.core import cgutils

from taut.ops._numba.scalar import FLOAT, INT32, intrinsic, splat, widen

LANES = 16
VECTOR = ir.VectorType(FLOAT, LANES)
WORD = ir.IntType(64)
BITS = {types.float32: 32, types.uint16: 16, types.int16: 16, types.int8: 8, types.uint8: 8}
ROOMY = bool(binding.get_host_cpu_features().get("avx512f"))
"""Whether there are 32 registers of 16 lanes; elsewhere there is a quarter of that room."""
WIDTH = LANES if ROOMY else LANES // 2
"""Lanes of a register, where a loop must fit into those there are."""
FUSE = ("contract",)
GROUP = 32


def load(builder: Any, address: Any, tag: types.Type, lanes: int) -> Any:
    """`lanes` stored values at an address, as float32."""
    kind = FLOAT if tag == types.float32 else ir.IntType(BITS[tag])
    kind = kind if lanes == 1 else ir.VectorType(kind, lanes)
    return widen(builder, builder.load(builder.inttoptr(address, kind.as_pointer()), align=BITS[tag] // 8), tag)


def store(builder: Any, value: Any, address: Any) -> None:
    builder.store(value, builder.inttoptr(address, value.type.as_pointer()), align=4)


def multiply_add(builder: Any, total: Any, a: Any, b: Any) -> None:
    """*total += a b"""
    product = builder.fmul(a, b, flags=FUSE)
    builder.store(builder.fadd(builder.load(total), product, flags=FUSE), total)


def loads_follow(builder: Any) -> None:
    """Keep the loads that come now behind those before, by a fence of one thread, which is no instruction.

    The compiler would load all that it can at once, for which there are no registers.
    """
    builder.fence("acq_rel", "singlethread")


def zeros(builder: Any, kind: ir.Type, count: int) -> list[Any]:
    totals = [cgutils.alloca_once(builder, kind) for _ in range(count)]
    for total in totals:
        builder.store(splat(kind, 0.0), total)
    return totals


def broadcast(builder: Any, value: Any, lanes: int = LANES) -> Any:
    none = ir.Constant(ir.VectorType(FLOAT, lanes), ir.Undefined)
    first = builder.insert_element(none, value, ir.Constant(INT32, 0))
    return builder.shuffle_vector(first, none, splat(ir.VectorType(INT32, lanes), 0))


def total_of(builder: Any, vectors: list[Any]) -> Any:
    """The sum of all lanes of the vectors in memory."""
    values = [builder.load(vector) for vector in vectors]
    while len(values) > 1:
        values = [builder.fadd(a, b, flags=FUSE) for a, b in zip(values[::2], values[1::2], strict=True)]
    kind = ir.FunctionType(FLOAT, [FLOAT, VECTOR])
    reduce = cgutils.get_or_insert_function(builder.module, kind, "llvm.vector.reduce.fadd.v16f32")
    return builder.call(reduce, [ir.Constant(FLOAT, 0.0), values[0]], fastmath=("reassoc",))


def at(builder: Any, base: Any, *terms: tuple[Any | int, Any | int]) -> Any:
    """base + the sum of products."""
    for count, size in terms:
        factors = [ir.Constant(WORD, n) if isinstance(n, int) else n for n in (count, size)]
        base = builder.add(base, builder.mul(*factors))
    return base


def upto(builder: Any, start: Any, stop: Any):
    return cgutils.for_range(builder, stop, start=start, intp=WORD)


@contextmanager
def rolled(builder: Any, start: Any, stop: Any, step: int = 1) -> Iterator[Any]:
    """A loop from start to stop that the compiler does not unroll."""
    before = builder.block
    head, body, after = (builder.append_basic_block(name) for name in ("head", "body", "after"))
    builder.branch(head)
    builder.position_at_end(head)
    index = builder.phi(WORD)
    index.add_incoming(start, before)
    builder.cbranch(builder.icmp_signed("<", index, stop), body, after)
    builder.position_at_end(body)
    yield index
    index.add_incoming(builder.add(index, ir.Constant(WORD, step)), builder.block)
    builder.branch(head).set_metadata("llvm.loop", not_unrolled(builder.module))
    builder.position_at_end(after)


def not_unrolled(module: Any) -> Any:
    """What marks a loop as one to be left as it is, of its own for every loop: it refers to itself."""
    wish, own = module.add_metadata(["llvm.loop.unroll.disable"]), ir.Constant(WORD, len(module.metadata))
    loop = module.add_metadata([own, wish])
    loop.operands = (loop, wish)
    return loop


@intrinsic(prefer_literal=True)
def dots(_typing, tag, count, row, x, stride, k, out):
    """out[t] = row . x[t] for t below a constant `count` of at most 4.

    `row` holds k values of the tag's format; `x` holds float32 rows, `stride` bytes apart; out is float32.
    """
    many, size = count.literal_value, BITS[types.unliteral(tag)] // 8
    unroll = {1: 4, 2: 4, 3: 2, 4: 2}[many]

    def generate(_context, builder, _signature, args):
        _, _, row, x, stride, k, out = args
        tag_type = types.unliteral(tag)
        sums = [zeros(builder, VECTOR, unroll) for _ in range(many)]

        def block(start: Any, step: int) -> None:
            w = load(builder, at(builder, row, (start, size)), tag_type, LANES)
            for t in range(many):
                value = load(builder, at(builder, x, (t, stride), (start, 4)), types.float32, LANES)
                multiply_add(builder, sums[t][step], w, value)

        whole = builder.sdiv(k, ir.Constant(WORD, LANES * unroll))
        zero = ir.Constant(WORD, 0)
        with upto(builder, zero, whole) as loop:
            for step in range(unroll):
                start = builder.mul(loop.index, ir.Constant(WORD, LANES * unroll))
                block(builder.add(start, ir.Constant(WORD, step * LANES)), step)
        with upto(
            builder, builder.mul(whole, ir.Constant(WORD, unroll)), builder.sdiv(k, ir.Constant(WORD, LANES))
        ) as loop:
            block(builder.mul(loop.index, ir.Constant(WORD, LANES)), 0)
        rest = zeros(builder, FLOAT, many)
        tail = builder.mul(builder.sdiv(k, ir.Constant(WORD, LANES)), ir.Constant(WORD, LANES))
        with upto(builder, tail, k) as loop:
            w = load(builder, at(builder, row, (loop.index, size)), tag_type, 1)
            for t in range(many):
                value = load(builder, at(builder, x, (t, stride), (loop.index, 4)), types.float32, 1)
                multiply_add(builder, rest[t], w, value)
        for t in range(many):
            value = builder.fadd(total_of(builder, sums[t]), builder.load(rest[t]), flags=FUSE)
            store(builder, value, at(builder, out, (t, 4)))

    return types.void(tag, count, *[types.int64] * 5), generate


HALVING = {2: [((0, 3), (1, 2))], 4: [((0, 1, 6, 7), (2, 3, 4, 5)), ((0, 2, 4, 6), (1, 3, 5, 7))]}
"""Which parts of two vectors of so many parts are added to which, until each vector has one part left. In the first
round one choice leaves all parts in their places: with AVX2 that is a blend, which any port can do."""


def pairwise(builder: Any, vectors: list[Any], *choices: list[int]) -> list[Any]:
    """Of every two vectors the lanes that the one choice picks from both together, plus those that the other picks."""
    masks = [ir.Constant(ir.VectorType(INT32, len(some)), [ir.Constant(INT32, n) for n in some]) for some in choices]
    pairs = zip(vectors[::2], vectors[1::2], strict=True)
    return [builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks), flags=FUSE) for a, b in pairs]


def picked(choice: tuple[int, ...], parts: int, size: int, lanes: int) -> list[int]:
    """The lanes of the chosen parts of `size` lanes, of every `parts` of them in two vectors."""
    firsts = [first + n // parts * lanes + n % parts * size for first in range(0, lanes, parts * size) for n in choice]
    return [first + n for first in firsts for n in range(size)]


def totals(builder: Any, vectors: list[Any]) -> Any:
    """The sums of the lanes of some vectors, as one vector of 4 lanes or, of more than 4 vectors, of all.

    A tree that costs three instructions a vector: first within each 4 lanes, then of these.
    """
    kind = vectors[0].type
    lanes, room = kind.count, 4 if len(vectors) <= 4 else kind.count
    vectors = vectors + [splat(kind, 0.0)] * (room - len(vectors))
    for size in (1, 4):
        parts = min(4, lanes // size)
        for choices in HALVING[parts]:
            if len(vectors) > 1:
                vectors = pairwise(builder, vectors, *(picked(some, parts, size, lanes) for some in choices))
    while lanes > room:
        lanes //= 2
        vectors = pairwise(builder, 2 * vectors, list(range(lanes)), list(range(lanes, 2 * lanes)))
    return vectors[0]


@intrinsic
def peak(_typing, values, count):
    """The greatest of `count` float32 values at an address, NaN left out; -inf where there are none."""

    def generate(_context, builder, _signature, args):
        values, count = args
        lowest = float("-inf")
        top, rest = cgutils.alloca_once(builder, VECTOR), cgutils.alloca_once(builder, FLOAT)
        builder.store(splat(VECTOR, lowest), top)
        builder.store(splat(FLOAT, lowest), rest)

        def raise_to(place: Any, value: Any) -> None:
            before = builder.load(place)
            builder.store(builder.select(builder.fcmp_ordered(">", value, before), value, before), place)

        whole = builder.sdiv(count, ir.Constant(WORD, LANES))
        with upto(builder, ir.Constant(WORD, 0), whole) as loop:
            raise_to(top, load(builder, at(builder, values, (loop.index, 4 * LANES)), types.float32, LANES))
        with upto(builder, builder.mul(whole, ir.Constant(WORD, LANES)), count) as loop:
            raise_to(rest, load(builder, at(builder, values, (loop.index, 4)), types.float32, 1))
        vector = builder.load(top)
        for lane in range(LANES):
            raise_to(rest, builder.extract_element(vector, ir.Constant(INT32, lane)))
        return builder.load(rest)

    return types.float32(values, count), generate
