"""A read of a GPU's memory at full speed."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def sums(values, found, size, BLOCK: tl.constexpr):
    """Program g of G adds up blocks g, g + G, ... of float32 values."""
    at = tl.arange(0, BLOCK)
    total = tl.zeros([BLOCK], tl.float32)
    for block in range(tl.program_id(0), tl.cdiv(size, BLOCK), tl.num_programs(0)):
        place = tl.cast(block, tl.int64) * BLOCK + at
        total += tl.load(values + place, mask=place < size, other=0)
    tl.store(found + tl.program_id(0), tl.sum(total, 0))


def read(values: Tensor, found: Tensor) -> Tensor:
    """Write sums of parts of contiguous float32 `values` into `found`, one for each program, and return it."""
    sums[(len(found),)](values, found, values.numel(), 4096)
    return found
