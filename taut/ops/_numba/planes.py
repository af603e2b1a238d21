"""Inputs as numbers of 24 bits, relative to the greatest of their group, in three planes of a signed byte.

Sums of codes times planes are exact, and an input loses what float32 loses of the greatest of its group.
"""

from __future__ import annotations

from typing import Any

from llvmlite import binding, ir
from numba import types

from taut.ops._numba.rows import indices
from taut.ops._numba.scalar import EXACT, FLOAT, INT32, call, splat
from taut.ops._numba.simd import GROUP, LANES, at, broadcast, load, store

VNNI = bool(binding.get_host_cpu_features().get("avx512vnni"))
"""Whether one instruction adds four products of bytes to each of 16 words."""
PAIRS = bool(binding.get_host_cpu_features().get("avx2")) and not VNNI
"""Whether instead one adds two products of bytes in each of 16 halves of a word."""
INTEGER = VNNI or PAIRS
GROUPS, COPIES = (2, 2) if PAIRS else (4, 1)
"""Groups whose codes fill a vector, and how often an input is there, for as many rows at a time."""
WIDE, SIZE = GROUPS * GROUP, GROUPS * GROUP // 2
"""Inputs that are arranged together, and the bytes of a vector of their codes."""
PLANES, HALVES, QUAD = 3, 2, 4
"""Bytes of an input, the highest first; halves of a byte of codes, which hold inputs i and 16 + i of a group; and lanes
of a group."""
LARGEST, LEAST = 0x7F7F00, 1e-30
"""What a group's greatest input becomes, a little below the largest number of three signed bytes, since it is rounded;
and what it is taken for at the least."""
SUMS_AT = PLANES * HALVES * COPIES * SIZE
SCALES_AT = SUMS_AT + SIZE
"""Where, behind the planes, lie the sums to be taken off each lane, and its scale."""

WORDS, BYTES = ir.VectorType(INT32, LANES), ir.VectorType(ir.IntType(8), LANES)


def greatest(builder: Any, vectors: list[Any]) -> Any:
    """The greatest size in the vectors, as a float; NaN where there is one."""
    bits = [builder.and_(builder.bitcast(v, WORDS), splat(WORDS, 0x7FFFFFFF)) for v in vectors]
    larger = builder.select(builder.icmp_signed(">", *bits), *bits)
    return builder.bitcast(call(builder, "llvm.vector.reduce.umax.v16i32", INT32, larger), FLOAT)


def rounded(builder: Any, vector: Any) -> Any:
    """Whole numbers, rounded to nearest; some number for NaN."""
    if VNNI:
        every, mode = ir.Constant(ir.IntType(16), -1), ir.Constant(INT32, 4)
        return call(builder, "llvm.x86.avx512.mask.cvtps2dq.512", WORDS, vector, splat(WORDS, 0), every, mode)
    half = ir.VectorType(INT32, LANES // 2)
    parts = [builder.shuffle_vector(vector, vector, indices(*range(n, n + half.count))) for n in (0, half.count)]
    low, high = (call(builder, "llvm.x86.avx.cvt.ps2dq.256", half, part) for part in parts)
    return builder.shuffle_vector(low, high, indices(*range(LANES)))


def put_planes(builder: Any, x: Any, to: Any) -> None:
    """WIDE inputs as planes of bytes, with the sums and the scales of their lanes behind."""
    each = LANES // COPIES
    for g in range(GROUPS):
        place = at(builder, x, (g, 4 * GROUP))
        values = [load(builder, at(builder, place, (h, 4 * LANES)), types.float32, LANES) for h in range(HALVES)]
        top, least = greatest(builder, values), ir.Constant(FLOAT, LEAST)
        top = builder.select(builder.fcmp_ordered("<", top, least, flags=EXACT), least, top)
        inverse = broadcast(builder, builder.fdiv(ir.Constant(FLOAT, float(LARGEST)), top, flags=EXACT))
        numbers = [rounded(builder, builder.fmul(v, inverse, flags=EXACT)) for v in values]
        _put_sums(builder, numbers, at(builder, to, (1, SUMS_AT), (g, 16)))
        scale = broadcast(builder, builder.fmul(top, ir.Constant(FLOAT, 1 / LARGEST), flags=EXACT))
        four = builder.shuffle_vector(scale, scale, indices(*range(QUAD)))
        store(builder, four, at(builder, to, (1, SCALES_AT), (g, 16)))
        for p in reversed(range(PLANES)):
            for h in range(HALVES):
                plane, place = (
                    builder.trunc(numbers[h], BYTES),
                    at(builder, to, (HALVES * p + h, COPIES * SIZE), (g, 16)),
                )
                for n in range(COPIES):
                    part = indices(*(n * each + i % each for i in range(LANES)))
                    store(builder, builder.shuffle_vector(plane, plane, part), at(builder, place, (n, SIZE)))
            # A signed byte below is taken off, which carries into the next one.
            numbers = [builder.ashr(builder.add(n, splat(WORDS, 128)), splat(WORDS, 8)) for n in numbers]


def _put_sums(builder: Any, numbers: list[Any], place: Any) -> None:
    """-8 times the sum of the numbers that each of four lanes multiplies with codes: the codes are biased by 8."""
    total = builder.add(*numbers)
    for by in (1, 2, 4, 8) if PAIRS else (1, 2):
        swapped = indices(*(n ^ by for n in range(LANES)))
        total = builder.add(total, builder.shuffle_vector(total, total, swapped))
    lanes = builder.shuffle_vector(total, total, indices(*range(0, LANES, QUAD)))
    store(builder, builder.mul(lanes, splat(lanes.type, -8)), place)
