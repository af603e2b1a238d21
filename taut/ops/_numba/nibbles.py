"""Products of a few tokens with the rows of a weight in int4: 16 bytes and a scale for every group of 32 inputs.

Where the processor multiplies bytes, the inputs become planes of them (planes.py): four products an instruction are
added here (AVX-512 VNNI), two in pairs.py (AVX2). Elsewhere the nibbles are taken in turn and multiplied as floats.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba import types

from taut.ops._numba.kernels import jit
from taut.ops._numba.pairs import tiles_pairs
from taut.ops._numba.planes import (
    COPIES,
    HALVES,
    INTEGER,
    PAIRS,
    PLANES,
    QUAD,
    SCALES_AT,
    SUMS_AT,
    VNNI,
    WIDE,
    WORDS,
    put_planes,
)
from taut.ops._numba.rows import (
    CHAINS,
    ROWS,
    Products,
    further,
    indices,
    load_first,
    prefetch,
    put_products,
    stored_type,
    tree,
    walk,
)
from taut.ops._numba.scalar import INT32, array, call, intrinsic, splat, widen
from taut.ops._numba.simd import (
    BITS,
    FUSE,
    GROUP,
    LANES,
    VECTOR,
    WORD,
    at,
    load,
    multiply_add,
    store,
    upto,
    zeros,
)


def decoded(builder: Any, words: Any) -> Any:
    """code - 8 for the lowest 4 bits of 16 words."""
    # Or-ing a code below 2^23 into the bits of 2^23 makes 2^23 + code without a conversion.
    codes = builder.or_(builder.and_(words, splat(WORDS, 15)), splat(WORDS, 0x4B000000))
    return builder.fsub(builder.bitcast(codes, VECTOR), splat(VECTOR, 2.0**23 + 8))


def float_blocks(builder: Any, words: list[Any], places: list[Any]) -> Products:
    """For every row of words and token a vector whose lanes add up to their product, by group, without the scales."""
    parts: list[list[list[Any]]] = [[[] for _ in places] for _ in words]
    for n in range(8):
        seen = [load(builder, at(builder, place, (n, 4 * LANES)), types.float32, LANES) for place in places]
        for row, word in zip(parts, words, strict=True):
            value = decoded(builder, builder.lshr(word, splat(WORDS, 4 * n)) if n else word)
            for part, x in zip(row, seen, strict=True):
                product = builder.fmul(value, x, flags=FUSE)
                part.append(product if n < CHAINS else builder.fadd(part.pop(0), product, flags=FUSE))
    return [[tree(builder, part) for part in row] for row in parts]


def load_words(builder: Any, address: Any) -> Any:
    return builder.load(builder.inttoptr(address, WORDS.as_pointer()), align=4)


def integer_blocks(builder: Any, words: list[Any], places: list[Any]) -> Products:
    """The same from planes: exact sums of (code - 8) times input, times the scale of the inputs."""
    low_bits = splat(WORDS, 0x0F0F0F0F)

    def block(halves: list[Any], place: Any) -> Any:
        planes = [splat(WORDS, 0)] * (PLANES - 1) + [load_words(builder, at(builder, place, (1, SUMS_AT)))]
        for p, total in enumerate(planes):
            for h, codes in enumerate(halves):
                inputs = load_words(builder, at(builder, place, (HALVES * p + h, 64)))
                total = call(builder, "llvm.x86.avx512.vpdpbusd.512", WORDS, total, codes, inputs)
            planes[p] = total
        whole = planes[0]
        for plane in planes[1:]:
            whole = builder.add(builder.shl(whole, splat(WORDS, 8)), plane)
        scale = load(builder, at(builder, place, (1, SCALES_AT)), types.float32, LANES)
        return builder.fmul(builder.sitofp(whole, VECTOR), scale, flags=FUSE)

    found = []
    for word in words:
        halves = [builder.and_(word, low_bits), builder.and_(builder.lshr(word, splat(WORDS, 4)), low_bits)]
        found.append([block(halves, place) for place in places])
    return found


def int4_products(
    builder: Any, tag: types.Type, rows: list[Any], scales: list[Any], inputs: list[Any], ahead: Any, groups: Any
) -> Products:
    """For every row and token a vector whose lanes add up to their product; four groups fill a vector."""
    size, kind = BITS[tag] // 8, stored_type(tag)
    sums = [zeros(builder, VECTOR, len(inputs)) for _ in rows]
    blocks = integer_blocks if VNNI else float_blocks

    def read(place: Any, kind: ir.Type, lanes: int, count: Any | None) -> Any:
        if count is not None:
            return load_first(builder, place, kind, lanes, builder.mul(count, ir.Constant(WORD, lanes // QUAD)))
        return builder.load(builder.inttoptr(place, ir.VectorType(kind, lanes).as_pointer()), align=1)

    def factor(scale: Any, start: Any, count: Any | None) -> Any:
        values = read(at(builder, scale, (start, size)), kind, QUAD, count)
        return widen(builder, builder.shuffle_vector(values, values, indices(*(n // QUAD for n in range(LANES)))), tag)

    def block(start: Any, count: Any | None) -> None:
        prefetch(builder, at(builder, ahead, (start, 16 * len(rows))), len(rows))
        words = [read(at(builder, row, (start, 16)), INT32, LANES, count) for row in rows]
        found = blocks(builder, words, [at(builder, x, (start, 4 * GROUP)) for x in inputs])
        for products, total, scale in zip(found, sums, scales, strict=True):
            scaling = factor(scale, start, count)
            for product, place in zip(products, total, strict=True):
                multiply_add(builder, place, product, scaling)

    walk(builder, groups, QUAD, block)
    return [[builder.load(total) for total in row] for row in sums]


def put_turned(builder: Any, x: Any, to: Any) -> None:
    """128 inputs as nibbles come out of words: lane 4g + q of vector 2b + h is input 32g + 16h + 4q + b."""
    pick = lambda a, b, lanes: builder.shuffle_vector(a, b, indices(*lanes))  # noqa: E731
    for h in range(HALVES):
        place = at(builder, x, (h, 4 * LANES))
        read = [load(builder, at(builder, place, (g, 4 * GROUP)), types.float32, LANES) for g in range(QUAD)]
        for b in range(QUAD):
            lanes = [LANES * g + QUAD * q + b for g in range(2) for q in range(QUAD)]
            low, high = pick(read[0], read[1], lanes), pick(read[2], read[3], lanes)
            store(builder, pick(low, high, range(LANES)), at(builder, to, (2 * b + h, 4 * LANES)))


@intrinsic
def arrange(_typing, x, to, count):
    """to = `count` floats, a multiple of WIDE, as `grouped` reads them; in COPIES times as much memory."""

    def generate(context, builder, _signature, args):
        x, to, count = args
        put = put_planes if INTEGER else put_turned
        with upto(builder, ir.Constant(WORD, 0), builder.sdiv(count, ir.Constant(WORD, WIDE))) as loop:
            put(builder, at(builder, x, (loop.index, 4 * WIDE)), at(builder, to, (loop.index, 4 * COPIES * WIDE)))
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), generate


@intrinsic(prefer_literal=True)
def tile_int4(
    _typing, tag, abreast, tokens, rows, w, w_stride, s, s_stride, stop, after, x, x_stride, groups, out, out_stride
):
    """`tile` of int4 codes in `groups` of 32 (16 bytes each, biased by 8), with a scale a group in the tag's format.

    x is what `arrange` makes.
    """
    many, kind = tokens.literal_value, types.unliteral(tag)

    def generate(_context, builder, _signature, args):
        _, _, _, rows, w, w_stride, s, s_stride, stop, after, x, x_stride, groups, out, out_stride = args
        inputs = [at(builder, x, (t, x_stride)) for t in range(many)]

        def products(numbers: list[Any]) -> Products:
            taken, scales = ([at(builder, p, (j, by)) for j in numbers] for p, by in ((w, w_stride), (s, s_stride)))
            return int4_products(builder, kind, taken, scales, inputs, further(builder, taken[0], stop, after), groups)

        put_products(builder, abreast.literal_value, many, rows, products, out, out_stride)

    return types.void(tag, abreast, tokens, *[types.int64] * 12), generate


@jit
def tiles_int4(rows, w, w_stride, s, s_stride, stop, after, x, x_stride, tokens, groups, out, out_stride, tag):
    """At most four rows by any number of tokens; four at once, since unpacking binds them and not reading."""
    t = 0
    while t + 2 <= tokens:
        seen, to = x + t * x_stride, out + t * out_stride
        if rows == ROWS:
            tile_int4(tag, ROWS, 2, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)
        else:
            tile_int4(tag, 1, 2, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)
        t += 2
    if t < tokens:
        seen, to = x + t * x_stride, out + t * out_stride
        if rows == ROWS:
            tile_int4(tag, ROWS, 1, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)
        else:
            tile_int4(tag, 1, 1, rows, w, w_stride, s, s_stride, stop, after, seen, x_stride, groups, to, out_stride)


tiles = tiles_pairs if PAIRS else tiles_int4


@jit
def grouped(w, s, x, x_stride, tokens, k, first, last, out, out_stride, after, tag):
    groups = k // 32
    size, wide = k // 2, groups * array(s, 1, tag).itemsize
    stop = w + last * size
    for row in range(first, last, ROWS):
        rows, at, to = min(ROWS, last - row), w + row * size, out + 4 * (row - first)
        tiles(rows, at, size, s + row * wide, wide, stop, after, x, x_stride, tokens, groups, to, out_stride, tag)
