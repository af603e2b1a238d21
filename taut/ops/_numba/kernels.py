"""How kernels are compiled, kept and called.

A function that another one calls by its name is compiled into it, again at every level, whether a program comes to it
or not. What is called by its address is compiled by itself, and only when something needs it: most of a first start
would else be spent on formats that the model has not.
"""

from __future__ import annotations

from collections.abc import Callable
from ctypes import CFUNCTYPE, c_int64
from functools import cache
from typing import Any

from llvmlite import ir
from numba import njit, types
from numba.core import cgutils
from numba.core.caching import FunctionCache
from numba.core.ccallback import CFunc

from taut.ops._numba.scalar import JIT, intrinsic
from taut.sources import digest

WORD = ir.IntType(64)
Address = Callable[[], int]
SOURCES = "**/_numba/*.py", "ops/_weights.py"
"""All that a kernel may be made of."""


class Kept(FunctionCache):
    """Machine code on disk, until any source changes: numba itself would look at the file of the function alone."""

    def __init__(self, function: Callable[..., Any], allocates: bool = False):
        super().__init__(function)
        self._cache_file._source_stamp = digest(*SOURCES)
        self.allocates = allocates

    def load_overload(self, sig: Any, target_context: Any) -> Any:
        """numba would first prepare to compile, which takes half a second and only what allocates needs."""
        if self.allocates:
            return super().load_overload(sig, target_context)
        with self._guard_against_spurious_io_errors():
            return self._load_overload(sig, target_context)


def options(allocates: bool) -> dict[str, Any]:
    """How a function is compiled. References to arrays are counted only where it makes some."""
    return JIT | {"_nrt": allocates}


def jit(function: Callable[..., Any], allocates: bool = False) -> Any:
    """`function` as a part of others, or called from Python. It takes memory from its caller."""
    compiled: Any = njit(**options(allocates))(function)
    compiled._cache = Kept(function, allocates)
    return compiled


def allocating(function: Callable[..., Any]) -> Any:
    """The same for what makes arrays of its own, and for all that call it."""
    return jit(function, allocates=True)


def kernel(function: Callable[..., None]) -> Address:
    """Gives the address of `function`, which takes int64 only and gives nothing back; compiled when first asked for."""
    signature = (types.int64,) * function.__code__.co_argcount, types.void

    @cache  # the machine code goes with this object
    def compiled() -> Any:
        found: Any = CFunc(function, signature, {}, options(allocates=False))
        found._cache = Kept(function)
        found.compile()
        return found

    return lambda: compiled().address


def callable_at(address: int, count: int) -> Callable[..., None]:
    """What calls the kernel of `count` arguments at an address from Python."""
    return CFUNCTYPE(None, *[c_int64] * count)(address)


@intrinsic
def invoke(_typing, address, arguments):
    """Call the kernel at an address."""

    def generate(context, builder, signature, args):
        address, values = args
        words = [
            context.cast(builder, value, kind, types.int64)
            for value, kind in zip(cgutils.unpack_tuple(builder, values), signature.args[1], strict=True)
        ]
        kind = ir.FunctionType(ir.VoidType(), [WORD] * len(words))
        builder.call(builder.inttoptr(address, kind.as_pointer()), words)
        return context.get_dummy_value()

    return types.void(types.int64, arguments), generate


@intrinsic
def record(_typing, address, kind):
    """The record of a numpy dtype at an address."""

    def generate(context, builder, signature, args):
        return builder.inttoptr(args[0], context.get_value_type(signature.return_type))

    return kind.dtype(types.int64, kind), generate
