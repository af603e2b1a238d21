"""Products with int4 rows where the processor adds two products of bytes at a time (AVX2): four rows at once.

Two rows share a vector, eight bytes of codes of each by turns, and the planes of the inputs have each eight bytes
twice: sums are taken of two rows, then of four together. A code is below 16, so that eight products of bytes fit 16
bits; a group's products of code - 8 and 24 bits fit a word.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from taut.ops._numba.kernels import jit
from taut.ops._numba.planes import COPIES, GROUPS, PLANES, SCALES_AT, SIZE, SUMS_AT
from taut.ops._numba.rows import LINE, ROWS, further, indices, prefetch, stored_type, walk
from taut.ops._numba.scalar import FLOAT, INT16, INT32, call, intrinsic, splat, widen
from taut.ops._numba.simd import BITS, FUSE, GROUP, WORD, at, multiply_add, store, zeros

BYTE = ir.IntType(8)
BYTES, SHORTS, WORDS = (ir.VectorType(kind, SIZE * 8 // kind.width) for kind in (BYTE, INT16, INT32))
SUMS = ir.VectorType(FLOAT, WORDS.count)
EVEN, ODD, LOW, HIGH = (0, 2, 4, 6), (1, 3, 5, 7), (0, 1, 4, 5), (2, 3, 6, 7)
"""Lanes of the halves of two vectors, the second's from 4 on."""


def read(builder: Any, base: Any, offset: Any, kind: ir.VectorType, count: int = 0) -> Any:
    """A vector at base + offset, or its first `count` lanes and zeros."""
    place = builder.gep(builder.inttoptr(base, BYTE.as_pointer()), [offset], source_etype=BYTE)
    stored = ir.VectorType(kind.element, count or kind.count)
    value = builder.load(builder.bitcast(place, stored.as_pointer()), align=1)
    return builder.shuffle_vector(value, ir.Constant(stored, None), indices(*range(kind.count))) if count else value


def mixed(builder: Any, a: Any, b: Any, lanes: tuple[int, ...]) -> Any:
    """In each half of a vector those lanes of a's half and b's."""
    numbers = (n % 4 + 4 * half + 8 * (n // 4) for half in range(2) for n in lanes)
    return builder.shuffle_vector(a, b, indices(*numbers))


def unpacked(builder: Any, a: Any, b: Any) -> list[Any]:
    """The codes of two rows in the order of a plane's vectors."""
    both, low_bits = [mixed(builder, a, b, lanes) for lanes in (LOW, HIGH)], splat(WORDS, 0x0F0F0F0F)
    shifted = [builder.lshr(words, splat(WORDS, 4)) for words in both]
    return [builder.bitcast(builder.and_(words, low_bits), BYTES) for words in both + shifted]


def dot(builder: Any, codes: list[Any], x: Any, start: Any) -> Any:
    """The sums of codes times numbers for two rows, each in two lanes of a half, without what codes are biased by."""
    planes = []
    for p, factor in zip(range(PLANES), (256, 1, 1), strict=True):
        pairs = []
        for n, some in enumerate(codes):
            inputs = read(builder, x, at(builder, start, (len(codes) * p + n, SIZE)), BYTES)
            pairs.append(call(builder, "llvm.x86.avx2.pmadd.ub.sw", SHORTS, some, inputs))
        total = builder.add(builder.add(*pairs[:2]), builder.add(*pairs[2:]))
        planes.append(call(builder, "llvm.x86.avx2.pmadd.wd", WORDS, total, splat(SHORTS, factor)))
    return builder.add(builder.shl(builder.add(*planes[:2]), splat(WORDS, 8)), planes[2])


def pair_products(
    builder: Any, tag: types.Type, rows: list[Any], scales: list[Any], inputs: list[Any], ahead: Any, groups: Any
) -> list[Any]:
    """For every token a vector whose halves add up to its products with four rows."""
    size, totals = BITS[tag] // 8, zeros(builder, SUMS, len(inputs))

    def factors(start: Any, rest: int) -> Any:
        """The scales of the rows for one group, then for the next one."""
        kind = ir.VectorType(stored_type(tag), GROUPS)
        offset = builder.mul(start, ir.Constant(WORD, size))
        values = [read(builder, scale, offset, kind, rest) for scale in scales]
        two, other = (builder.shuffle_vector(*values[n : n + 2], indices(*range(4))) for n in (0, 2))
        return widen(builder, builder.shuffle_vector(two, other, indices(*EVEN, *ODD)), tag)

    def block(start: Any, count: Any | None) -> None:
        rest = 0 if count is None else 1
        prefetch(builder, at(builder, ahead, (start, 16 * ROWS)), ROWS * SIZE // LINE)
        place = builder.mul(start, ir.Constant(WORD, 4 * COPIES * GROUP))
        codes_at = builder.mul(start, ir.Constant(WORD, 16))
        found: list[list[Any]] = [[] for _ in inputs]
        for n in (0, 2):
            a, b = (read(builder, row, codes_at, WORDS, 4 * rest) for row in rows[n : n + 2])
            codes = unpacked(builder, a, b)
            # LLVM would load a plane for both, and spill it: as operands of the products they cost nothing.
            builder.asm(ir.FunctionType(ir.VoidType(), []), "", "~{memory}", [], True)
            for x, sums in zip(inputs, found, strict=True):
                sums.append(dot(builder, codes, x, place))
        scaling = factors(start, rest)
        for x, sums, total in zip(inputs, found, totals, strict=True):
            even, odd = (mixed(builder, sums[0], sums[1], lanes) for lanes in (EVEN, ODD))
            whole = builder.add(builder.add(even, odd), read(builder, x, at(builder, place, (1, SUMS_AT)), WORDS))
            scale = read(builder, x, at(builder, place, (1, SCALES_AT)), SUMS)
            multiply_add(builder, total, builder.fmul(builder.sitofp(whole, SUMS), scale, flags=FUSE), scaling)

    walk(builder, groups, GROUPS, block)
    return [builder.load(total) for total in totals]


def put(builder: Any, found: Any, out: Any, rows: Any) -> None:
    """out[j] = the sum of lanes j and 4 + j, for the first `rows` j of ROWS."""
    halves = (builder.shuffle_vector(found, found, indices(*range(n, n + ROWS))) for n in (0, ROWS))
    sums = builder.fadd(*halves, flags=FUSE)
    with builder.if_else(builder.icmp_signed("==", rows, ir.Constant(WORD, ROWS))) as (all_of_them, some):
        with all_of_them:
            store(builder, sums, out)
        with some:
            for j in range(ROWS):
                with builder.if_then(builder.icmp_signed("<", ir.Constant(WORD, j), rows)):
                    store(builder, builder.extract_element(sums, ir.Constant(INT32, j)), at(builder, out, (j, 4)))


@intrinsic(prefer_literal=True)
def tile_pairs(_typing, tag, tokens, rows, w, w_stride, s, s_stride, stop, after, x, x_stride, groups, out, out_stride):
    """`tile_int4` for at most four `rows`: where there are fewer, the last one is taken for those that lack."""
    many, kind = tokens.literal_value, types.unliteral(tag)

    def generate(context, builder, _signature, args):
        _, _, rows, w, w_stride, s, s_stride, stop, after, x, x_stride, groups, out, out_stride = args
        last = builder.sub(rows, ir.Constant(WORD, 1))
        numbers = [ir.Constant(WORD, j) for j in range(ROWS)]
        numbers = [builder.select(builder.icmp_signed("<", j, last), j, last) for j in numbers]
        taken, scales = ([at(builder, p, (j, by)) for j in numbers] for p, by in ((w, w_stride), (s, s_stride)))
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]
        found = pair_products(builder, kind, taken, scales, inputs, further(builder, w, stop, after), groups)
        for t, vector in enumerate(found):
            put(builder, vector, at(builder, out, (t, out_stride)), rows)
        return context.get_dummy_value()

    return types.void(tag, tokens, *[types.int64] * 12), generate


@jit
def tiles_pairs(rows, w, w_stride, s, s_stride, stop, after, x, x_stride, tokens, groups, out, out_stride, tag):
    """At most four rows by any number of tokens; three at once have too few registers."""
    t = 0
    while t + 2 <= tokens:
        seen, to = x + t * x_stride, out + t * out_stride
        tile_pairs(tag, 2, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)
        t += 2
    if t < tokens:
        seen, to = x + t * x_stride, out + t * out_stride
        tile_pairs(tag, 1, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)
