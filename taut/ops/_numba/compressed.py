"""Weights without loss in three quarters of bfloat16's memory, or seven eighths of float32's.

The high byte of a weight, its sign and most of its exponent, takes few values: four bits name one of the sixteen that a
block of rows uses most, and one instruction looks up those of a whole register. What is in no table, about one number
of ten thousand, is zero there and is multiplied apart.

Of sixteen rows abreast a block holds its table, rounds of four inputs, and its exceptions. A round holds the names, two
a byte, then every next byte and, of float32, the low halves, in the order in which registers of this processor put them
together.

Source: Zhang and others, 70% Size, 100% Accuracy: Lossless LLM Compression for Efficient GPU Inference via
Dynamic-Length Float (DFloat11), 2025, arXiv:2504.11651, which finds 2.6 bits in the exponents of trained weights.
Differs: names have one length, so that a register of them is looked up at once and every block lies where it is sought.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from llvmlite import binding, ir
from numba import types
from numba.extending import register_jitable

from taut.ops._numba.kernels import jit
from taut.ops._numba.rows import indices
from taut.ops._numba.scalar import FLOAT, INT16, array, call, intrinsic, splat
from taut.ops._numba.simd import ROOMY, WIDTH, at
from taut.ops._weights import ABREAST, INPUTS

LOOKS_UP = bool(binding.get_host_cpu_features().get("avx512bw" if ROOMY else "avx2"))
"""Whether one instruction looks up a register of names."""
NAMES, HEAD = 16, 32
"""High bytes of a table, and the bytes before the rounds of a block: its table, and how many exceptions have room."""
NUMBERS = ABREAST * INPUTS
"""Numbers of a round."""
NEXT, LOWS = NUMBERS // 2, NUMBERS // 2 + NUMBERS
"""Where in a round the bytes next to the high ones lie, and the low halves."""
QUARTER = 4
"""Rows of which a register of 128 bits holds one input: what is put together stays within those."""
EXCEPTION, ALIGNED = 8, 4
"""Bytes of an exception, where it stands in the block and its value; and so many of them go on at a multiple of 32."""
STORED = {types.uint8: 2, types.uint32: 4}
"""Tags of compressed weights, uint8 for bfloat16 and uint32 for float32, and the bytes of a number that these take."""
UNUSED = 255
"""What fills the room of exceptions that there are not: a place below zero."""
BYTE = ir.IntType(8)


@register_jitable
def size_of_round(itemsize):
    """Of numbers of so many bytes."""
    return LOWS + (itemsize - 2) * NUMBERS


@register_jitable
def size_of_block(k, itemsize, room):
    """Of rows of k numbers of so many bytes, with room for so many exceptions."""
    return HEAD + (k + INPUTS - 1) // INPUTS * size_of_round(itemsize) + room * EXCEPTION


def loaded(builder: Any, place: Any, kind: ir.Type, count: int) -> Any:
    return builder.load(builder.inttoptr(place, ir.VectorType(kind, count).as_pointer()), align=1)


def interleaved(builder: Any, low: Any, high: Any, half: int) -> Any:
    """Numbers of twice the size from the low or the high half of every 128 bits: one instruction."""
    count, each = low.type.count, 128 // low.type.element.width
    picked = [
        number
        for first in range(0, count, each)
        for i in range(first + half * each // 2, first + (half + 1) * each // 2)
        for number in (i, count + i)
    ]
    return builder.shuffle_vector(low, high, indices(*picked))


def looked_up(builder: Any, table: Any, names: Any) -> Any:
    """The byte of a table that each name stands for."""
    name = "llvm.x86.avx512.pshuf.b.512" if ROOMY else "llvm.x86.avx2.pshuf.b"
    return call(builder, name, names.type, table, names)


def names_at(builder: Any, place: Any) -> list[Any]:
    """Registers of names: low halves of bytes name the first half of a round, high ones the other."""
    both = loaded(builder, place, BYTE, NEXT)
    low, high = builder.and_(both, splat(both.type, 15)), builder.lshr(both, splat(both.type, 4))
    return [builder.shuffle_vector(low, high, indices(*range(NUMBERS)))] if ROOMY else [low, high]


def widened(builder: Any, kind: types.Type, place: Any, head: Any) -> Iterator[list[Any]]:
    """Of the rows of each register the INPUTS inputs of a round, as float32."""
    size, short = INPUTS * WIDTH, ir.VectorType(INT16, 2 * WIDTH)
    table = loaded(builder, head, BYTE, NAMES)
    table = builder.shuffle_vector(table, table, indices(*(i % NAMES for i in range(size))))
    for part, names in enumerate(names_at(builder, place)):
        high, found = looked_up(builder, table, names), []
        next_ = loaded(builder, at(builder, place, (1, NEXT), (part, size)), BYTE, size)
        for pair in range(INPUTS // 2):
            upper = builder.bitcast(interleaved(builder, next_, high, pair), short)
            lower = ir.Constant(short, None)
            if STORED[kind] == 4:
                lower = loaded(builder, at(builder, place, (1, LOWS), (2 * part + pair, size)), INT16, 2 * WIDTH)
            numbers = [interleaved(builder, lower, upper, half) for half in range(2)]
            found += [builder.bitcast(number, ir.VectorType(FLOAT, WIDTH)) for number in numbers]
        yield found


@intrinsic
def is_compressed(_typing, tag):
    """Whether a tag is that of a compressed weight."""
    return types.boolean(tag), lambda *_: ir.Constant(ir.IntType(1), tag in STORED)


@jit
def head_of(tag):
    """Bytes before the rounds of a block."""
    return HEAD if is_compressed(tag) else 0


@jit
def exceptions(w, tag):
    """Bytes after the rounds of a block of the weight that begins at w."""
    return array(w + NAMES, 1, np.int32(0))[0] * EXCEPTION if is_compressed(tag) else 0


@jit
def add_exceptions(place, stop, x, x_stride, tokens, out, out_stride):
    """out[t, row] += the exceptions of a block times x[t]."""
    while place < stop:
        where = array(place, 1, np.int32(0))[0]
        if where < 0:
            return
        value = array(place + 4, 1, np.float32(0))[0]
        for t in range(tokens):
            row = array(out + t * out_stride, ABREAST, np.float32(0))
            row[where % ABREAST] += value * array(x + t * x_stride + 4 * (where // ABREAST), 1, np.float32(0))[0]
        place += EXCEPTION
