"""What every kernel is made of: addresses as arrays, conversions between storage formats and float32, exp and tanh."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np
from llvmlite import binding, ir
from numba import extending, njit, types
from numba.core import cgutils

# Their results are called otherwise than what they decorate, which type checkers cannot know.
intrinsic: Any = extending.intrinsic
overload: Any = extending.overload

# No nnan and no ninf: a NaN must come through.
JIT: dict[str, Any] = {
    "fastmath": {"reassoc", "contract", "nsz", "arcp"},
    "boundscheck": False,
    "error_model": "numpy",
    "nogil": True,
}

FLOAT, HALF, INT32, INT16 = ir.FloatType(), ir.HalfType(), ir.IntType(32), ir.IntType(16)
EXACT = ("nsz",)  # a flag of its own keeps numba from adding the fast ones


class BFloat(ir.Type):
    """LLVM's bfloat16, which llvmlite does not know."""

    def _to_string(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, BFloat)

    def __hash__(self) -> int:
        return hash(BFloat)


ROUNDS = bool(binding.get_host_cpu_features().get("avx512bf16"))
"""Whether one instruction rounds a vector to bfloat16. It takes numbers below the normal range for zero. Of scalars in
a loop LLVM makes no vector if they are rounded so."""


def like(kind: ir.Type, shape: ir.Type) -> ir.Type:
    """`kind`, as a vector if `shape` is one."""
    return ir.VectorType(kind, shape.count) if isinstance(shape, ir.VectorType) else kind


def splat(kind: ir.Type, value: float) -> ir.Constant:
    if isinstance(kind, ir.VectorType):
        return ir.Constant(kind, [ir.Constant(kind.element, value)] * kind.count)
    return ir.Constant(kind, value)


def call(builder: Any, name: str, kind: ir.Type, *arguments: Any) -> Any:
    """What one of LLVM's functions gives, by its name."""
    signature = ir.FunctionType(kind, [argument.type for argument in arguments])
    return builder.call(cgutils.get_or_insert_function(builder.module, signature, name), arguments)


def widen(builder: ir.IRBuilder, value: Any, tag: types.Type) -> Any:
    """float32 of a stored value or vector: uint16 holds bfloat16, int16 holds float16, bytes hold
    themselves."""
    wide, word = like(FLOAT, value.type), like(INT32, value.type)
    if tag == types.uint16:
        return builder.bitcast(builder.shl(builder.zext(value, word), splat(word, 16)), wide)
    if tag == types.int16:
        return builder.fpext(builder.bitcast(value, like(HALF, value.type)), wide)
    if tag == types.int8:
        return builder.sitofp(value, wide)
    if tag == types.uint8:
        return builder.uitofp(value, wide)
    return value


def narrow(builder: ir.IRBuilder, value: Any, tag: types.Type) -> Any:
    """The stored form of a float32 or a vector of them, rounded to nearest even."""
    word, short = like(INT32, value.type), like(INT16, value.type)
    if tag == types.uint16 and ROUNDS and word is not INT32:
        return builder.bitcast(builder.fptrunc(value, like(BFloat(), value.type)), short)
    if tag == types.uint16:
        bits = builder.bitcast(value, word)
        odd = builder.and_(builder.lshr(bits, splat(word, 16)), splat(word, 1))
        rounded = builder.add(bits, builder.add(odd, splat(word, 0x7FFF)))
        size = builder.and_(bits, splat(word, 0x7FFFFFFF))
        is_nan = builder.icmp_unsigned(">", size, splat(word, 0x7F800000))
        rounded = builder.select(is_nan, splat(word, 0x7FC00000), rounded)
        return builder.trunc(builder.lshr(rounded, splat(word, 16)), short)
    if tag == types.int16:
        return builder.bitcast(builder.fptrunc(value, like(HALF, value.type)), short)
    return value


@intrinsic
def up(_typing, value):
    """float32 of a stored value."""
    return types.float32(value), lambda _, builder, signature, args: widen(builder, args[0], signature.args[0])


@intrinsic
def down(_typing, value, tag):
    """A float32 as stored in the tag's format."""
    return tag(types.float32, tag), lambda _, builder, signature, args: narrow(builder, args[0], signature.args[1])


@intrinsic
def array(_typing, address, shape, tag):
    """The memory at an address as an array of the tag's dtype."""
    return _array_of(types.unliteral(tag), address, shape, tag)


@intrinsic
def floats(_typing, address, count):
    """The memory at an address as so many float32."""
    return _array_of(types.float32, address, count)


@intrinsic
def words(_typing, address, count):
    """The memory at an address as so many int64."""
    return _array_of(types.int64, address, count)


def _array_of(dtype: types.Type, address: types.Type, shape: Any, *more: types.Type) -> Any:
    """numba's carray is a function, and a function that counts no references cannot return an array."""
    many = isinstance(shape, types.BaseTuple)
    sizes_of: Any = shape if many else [shape]
    kind = types.Array(dtype, len(sizes_of), "C")

    def generate(context, builder, signature, args):
        from numba.np.arrayobj import make_array, populate_array  # what loads machine code does not need it

        sizes = cgutils.unpack_tuple(builder, args[1]) if many else [args[1]]
        sizes = [context.cast(builder, size, of, types.intp) for size, of in zip(sizes, sizes_of, strict=True)]
        item = context.get_constant(types.intp, context.get_abi_sizeof(context.get_data_type(dtype)))
        strides = [item]
        for size in reversed(sizes[1:]):
            strides.insert(0, builder.mul(strides[0], size))
        found = make_array(kind)(context, builder)
        data = builder.inttoptr(args[0], found.data.type)
        populate_array(found, data=data, shape=sizes, strides=strides, itemsize=item, meminfo=None)
        return found._getvalue()

    return kind(address, shape, *more), generate


@njit(inline="always")
def borrowed(owned) -> Any:
    """The same float32 memory without an owner: threads that count references to one array wait for each other."""
    return array(owned.ctypes.data, owned.shape, np.float32(0))


@njit(inline="always")
def span(count, part, parts):
    """The half-open range that is the part-th of `parts` equal ones."""
    return count * part // parts, count * (part + 1) // parts


EXP = (1.9875691500e-4, 1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1, 1.0, 1.0)


@intrinsic
def exp(_typing, x):
    """e^x to about one ulp, in instructions that the loop vectoriser knows; 0 below the normal range."""

    def generate(_context, builder, _signature, args):
        (x,) = args
        constant = lambda value: ir.Constant(FLOAT, value)  # noqa: E731
        vanished = builder.fcmp_ordered("<", x, constant(-87.3), flags=EXACT)
        x = builder.select(vanished, constant(-87.3), x)
        x = builder.select(builder.fcmp_ordered(">", x, constant(89.0), flags=EXACT), constant(89.0), x)
        n = call(builder, "llvm.rint.f32", FLOAT, builder.fmul(x, constant(1.44269504088896341), flags=EXACT))
        r = builder.fma(n, constant(-0.693359375), x)
        r = builder.fma(n, constant(2.12194440e-4), r)
        y = constant(EXP[0])
        for coefficient in EXP[1:]:
            y = builder.fma(y, r, constant(coefficient))
        power = builder.shl(builder.add(builder.fptosi(n, INT32), splat(INT32, 127)), splat(INT32, 23))
        y = builder.fmul(y, builder.bitcast(power, FLOAT), flags=EXACT)
        return builder.select(vanished, constant(0.0), y)

    return types.float32(types.float32), generate


@njit(inline="always")
def tanh(x):
    """tanh to about two ulps."""
    z = x * x
    p = nb.float32(-5.70498872745e-3) * z + nb.float32(2.06390887954e-2)
    p = (p * z - nb.float32(5.37397155531e-2)) * z + nb.float32(1.33314422036e-1)
    near = x + x * z * (p * z - nb.float32(3.33332819422e-1))
    size = abs(x)
    far = nb.float32(1) - nb.float32(2) / (exp(nb.float32(2) * size) + nb.float32(1))
    return near if size < nb.float32(0.625) else (far if x > 0 else -far)
