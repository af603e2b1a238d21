"""A read of memory at full speed."""

from __future__ import annotations

import numba as nb
import numpy as np
from numba import njit

from taut.ops._numba.parallel import shared
from taut.ops._numba.scalar import JIT, array, span


@njit(**JIT)
def read_part(part, parts, address, count, sums):
    first, last = span(count, part, parts)
    values, total = array(address + 4 * first, last - first, np.float32(0)), nb.float32(0)
    for i in range(len(values)):
        total += values[i]
    sums[part] = total


share_read = shared(read_part)


@njit(**JIT)
def read(address, count, parts):
    """The sum of `count` float32 values, by `parts` threads."""
    sums = np.zeros(parts, np.float32)
    share_read(parts, (address, count, sums))
    return sums.sum()
