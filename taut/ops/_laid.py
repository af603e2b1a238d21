"""How weights lie where a CPU reads them best: sixteen rows abreast and, where that saves memory, compressed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops._cpu import threads
from taut.ops._weights import ABREAST, INPUTS

FEW = {torch.bfloat16: (2, 4), torch.float32: (0, 4)}
"""Tokens for which reading less gains more than widening costs, where registers are few and where they are many."""
MOST_EXCEPTIONS = 1 / 128
"""The part of a block's numbers up to which exceptions take little time beside its rounds."""
COMPRESSED = {torch.bfloat16: (np.uint16(0), torch.uint16), torch.float32: (np.float32(0), torch.uint32)}
"""What is compressed, as numba takes it, and the dtype that tells what a compressed weight holds."""


@dataclass(frozen=True)
class Laid:
    """A tensor of so many bytes; `write` puts it into memory, uint8 (nbytes,), and gives the view of it."""

    nbytes: int
    write: Callable[[Tensor], Tensor]


def laid(weight: Tensor, tokens: int, cached: bool = False) -> Laid:
    """A weight (out, in) as up to so many tokens at a time are multiplied by it best.

    What stays in a cache of the processor is read faster than it would be widened.
    """
    from taut.ops._numba.simd import ROOMY

    if not lies_abreast(weight.dtype, tokens):
        return copied(weight)
    pays = not cached and tokens <= FEW.get(weight.dtype, (0, 0))[ROOMY]
    return (compressed(weight.detach()) if pays else None) or copied(abreast(weight))


def copied(t: Tensor) -> Laid:
    """A tensor as it is, without gaps."""
    return Laid(t.nbytes, lambda room: room.view(t.dtype).view(t.shape).copy_(t.detach()))


def lies_abreast(dtype: torch.dtype, tokens: int) -> bool:
    """Whether up to so many tokens at a time are multiplied faster by a weight in a dtype with 16 rows abreast.

    int8 only for several tokens where registers are few: whole rows, whose sums need more of them, take fewer
    instructions.
    """
    from taut.ops._numba.simd import ROOMY

    return dtype.is_floating_point or (dtype == torch.int8 and tokens > 1 and not ROOMY)


def abreast(weight: Tensor) -> Tensor:
    """Floats or int8 (out, in) as (blocks of 16 outputs, inputs, 16), the order in which a CPU reads a weight best.

    Outputs and inputs are padded with zeros, inputs to a multiple of 4. Of bfloat16 two inputs make an int32, the first
    one in its low half. A view where nothing has to be padded or moved.
    """
    outputs, inputs = weight.shape
    weight, missing = weight.detach(), (0, -inputs % INPUTS, 0, -outputs % ABREAST)
    if any(missing):  # F.pad copies even where nothing is missing
        weight = F.pad(weight, missing)
    if weight.dtype == torch.bfloat16:
        weight = weight.contiguous()
        weight = (weight.clone() if weight.storage_offset() % 2 else weight).view(torch.int32)
    return weight.unflatten(0, (-1, ABREAST)).mT


def compressed(weight: Tensor) -> Laid | None:
    """A weight (out, in) without loss in fewer bytes, as (blocks of 16 outputs, what a block takes).

    In uint16 of bfloat16, in uint32 of float32. None where the processor has no instruction for it, for other dtypes,
    and where its numbers are spread too widely: see ops/_numba/compressed.
    """
    from taut.ops._numba import compressed as c
    from taut.ops._numba.compressing import compress, name_all

    if not c.LOOKS_UP or weight.dtype not in COMPRESSED or not weight.numel():
        return None
    tag, stored = COMPRESSED[weight.dtype]
    (n, k), blocks, parts = weight.shape, -(-len(weight) // ABREAST), threads(weight.nbytes)
    tables, given = np.empty((blocks, c.NAMES), np.uint8), weight.contiguous()
    counts, found = np.empty((parts, 256), np.int64), np.zeros(parts, np.int64)
    places = tables.ctypes.data, counts.ctypes.data, found.ctypes.data
    name_all(given.data_ptr(), n, k, weight.itemsize, *places, parts)
    most = int(found.max())
    room = -(-most // c.ALIGNED) * c.ALIGNED
    size = c.size_of_block(k, weight.itemsize, room)
    if most > MOST_EXCEPTIONS * ABREAST * k or size >= ABREAST * k * weight.itemsize:
        return None

    def write(memory: Tensor) -> Tensor:
        given = weight.contiguous()  # a copy of one weight at a time
        edges = np.empty((parts, c.NUMBERS * weight.itemsize), np.uint8)
        compress(given.data_ptr(), n, k, tables.ctypes.data, room, edges.ctypes.data, memory.data_ptr(), tag, parts)
        return memory.view(blocks, size).view(stored)

    return Laid(blocks * size, write)
