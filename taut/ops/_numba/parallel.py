"""Sharing work among threads: those of torch's own OpenMP, so that two pools never fight for the cores."""

from __future__ import annotations

import ctypes

import llvmlite.binding as llvm
import torch  # noqa: F401  (loads the OpenMP whose symbols are looked up below)
from llvmlite import ir
from numba import types
from numba.core import cgutils

from taut.ops._numba.scalar import INT32, intrinsic

WORD, PLACE = ir.IntType(64), ir.IntType(8).as_pointer()
ENTRIES = ("GOMP_parallel", "omp_get_thread_num", "omp_get_num_threads")


def _openmp() -> bool:
    """Make OpenMP's entries known to the compiler under names of our own; whether the process has them."""
    process = ctypes.CDLL(None)
    found = all(hasattr(process, entry) for entry in ENTRIES)
    for entry in ENTRIES:
        llvm.add_symbol(f"taut_{entry}", ctypes.cast(getattr(process, entry), ctypes.c_void_p).value if found else 1)
    return found


HAS_OPENMP = _openmp()


def together(body):
    """`shared` for parts that wait for each other: every part has a thread of its own, so they may be fewer."""
    return shared(body, together=True)


def shared(body, together: bool = False):
    """share(parts, arguments), which runs body(part, parts, *arguments) for every part."""

    @intrinsic
    def share(typing, parts, arguments):
        signature = types.Dispatcher(body).get_call_type(typing, (types.int64, types.int64, *arguments.types), {})

        def generate(context, builder, _signature, args):
            parts, values = args
            compiled = body.get_compile_result(signature)
            context.add_linking_libs((compiled.library,))
            alone = builder.icmp_signed("==", parts, ir.Constant(WORD, 1))
            with builder.if_else(alone) as (here, everywhere):
                with here:
                    place = [ir.Constant(WORD, 0), parts, *cgutils.unpack_tuple(builder, values)]
                    context.call_internal_no_propagate(builder, compiled.fndesc, signature, place)
                with everywhere:
                    _launch(context, builder, parts, values, compiled, signature, together)

        return types.void(types.int64, arguments), generate

    return share


def _launch(context, builder, parts, values, compiled, signature, together):
    """Start a team on the outlined function."""
    packed = cgutils.make_anonymous_struct(builder, [values, parts])
    name = f"{builder.function.name}.team"
    outlined = _outline(context, builder.module, name, packed.type, compiled, signature, together)
    kind = ir.FunctionType(ir.VoidType(), [outlined.type, PLACE, INT32, INT32])
    launch = cgutils.get_or_insert_function(builder.module, kind, "taut_GOMP_parallel")
    data = builder.bitcast(cgutils.alloca_once_value(builder, packed), PLACE)
    builder.call(launch, [outlined, data, builder.trunc(parts, INT32), ir.Constant(INT32, 0)])


def _outline(context, module, name, packed, compiled, signature, together):
    """What each thread runs: every so many parts, since a nested team may be smaller than was asked for.

    `together` makes the team's size the number of parts instead.
    """
    function = ir.Function(module, ir.FunctionType(ir.VoidType(), [PLACE]), module.get_unique_name(name))
    function.linkage = "internal"
    builder = ir.IRBuilder(function.append_basic_block())
    ask = ir.FunctionType(INT32, [])
    number, team = (
        builder.sext(builder.call(cgutils.get_or_insert_function(module, ask, f"taut_{entry}"), []), WORD)
        for entry in ENTRIES[1:]
    )
    whole = builder.load(builder.bitcast(function.args[0], packed.as_pointer()))
    parts, values = builder.extract_value(whole, 1), cgutils.unpack_tuple(builder, builder.extract_value(whole, 0))
    parts = team if together else parts
    with cgutils.for_range_slice(builder, number, parts, team, WORD) as (part, _):
        context.call_internal_no_propagate(builder, compiled.fndesc, signature, [part, parts, *values])
    builder.ret_void()
    return function
