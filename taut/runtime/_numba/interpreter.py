"""Runs a segment of a program: one parallel region, in which threads wait for each other only where a step needs it."""

from __future__ import annotations

import platform

import numpy as np
from llvmlite import ir
from numba import types

from taut.ops._numba.kernels import invoke, jit, kernel, record
from taut.ops._numba.parallel import together
from taut.ops._numba.rows import fetch
from taut.ops._numba.scalar import array, call, intrinsic
from taut.runtime._numba.dense import beginning, unasked
from taut.runtime._numba.table import ATTENTION, STEP

WORD = ir.IntType(64)
PAUSE = {"x86_64": "llvm.x86.sse2.pause", "AMD64": "llvm.x86.sse2.pause"}.get(platform.machine())
PATIENCE = 20000
"""Rounds of waiting after which the processor is offered to others."""

MEANWHILE, PORTION = 2**17, 512
"""Bytes that are asked for at most while a thread waits, and at a time."""

SIZE, ATTENTION_SIZE = STEP.itemsize, ATTENTION.itemsize

give_way = types.ExternalFunction("sched_yield", types.int32())


@intrinsic
def arrive(_typing, counter):
    """Add one to the counter at an address."""

    def generate(_context, builder, _signature, args):
        place = builder.inttoptr(args[0], WORD.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(WORD, 1), "acq_rel")

    return types.int64(counter), generate


@intrinsic
def arrived(_typing, counter):
    """The counter at an address; what others wrote before they arrived is then visible."""

    def generate(_context, builder, _signature, args):
        return builder.load_atomic(builder.inttoptr(args[0], WORD.as_pointer()), "acquire", 8)

    return types.int64(counter), generate


@intrinsic
def pause(_typing):
    """Tell the processor that this thread only waits, where there is an instruction for it."""

    def generate(context, builder, _signature, _args):
        if PAUSE:
            call(builder, PAUSE, ir.VoidType())
        return context.get_dummy_value()

    return types.void(), generate


@jit
def wait_for(counter, count, soon):
    """Until so many have arrived; meanwhile memory is asked for what stands at `soon` and behind it."""
    rounds = 0
    arrive(counter)
    while arrived(counter) < count:
        if rounds < MEANWHILE // PORTION:
            fetch(soon + rounds * PORTION, PORTION)
        pause()
        rounds += 1
        if rounds > PATIENCE:
            give_way()


@jit
def play(part, parts, steps, attends, first, last, rows, tokens, positions, slots, scratch, stride, counter):
    """The part-th share of the steps from first to last."""
    mine, waits = scratch + part * stride, 0
    for s in range(first, last):
        step = steps + s * SIZE
        p = record(step, STEP)
        attention = attends + p.attend * ATTENTION_SIZE
        after = beginning(record(steps + p.next * SIZE, STEP), part, parts)
        arguments = step, attention, rows, tokens, positions, slots, mine, part, parts, after
        if p.early:
            invoke(p.early, arguments)
        if p.wait and rows >= p.wait and parts > 1:
            waits += 1
            soon = unasked(record(steps + p.soon * SIZE, STEP), rows, part, parts)
            wait_for(counter, waits * parts, soon)
        invoke(p.run, arguments)


play_together = together(play)


@kernel
def run(steps, attends, first, last, rows, tokens, positions, slots, scratch, stride, counter, parts):
    """Run the steps from first to last on `rows` rows by a team of `parts` threads. All else is addresses and bytes."""
    array(counter, 1, np.int64(0))[0] = 0
    play_together(parts, (steps, attends, first, last, rows, tokens, positions, slots, scratch, stride, counter))
