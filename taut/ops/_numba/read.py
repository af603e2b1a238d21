"""A read of memory at full speed."""

from __future__ import annotations

import numba as nb
import numpy as np
from numba import njit, prange

from taut.ops._numba.scalar import JIT, array, span


@njit(parallel=True, **JIT)
def read(address, count, parts):
    """The sum of `count` float32 values, by `parts` threads."""
    sums = np.zeros(parts, np.float32)
    for part in prange(parts):
        first, last = span(count, part, parts)
        values, total = array(address + 4 * first, last - first, np.float32(0)), nb.float32(0)
        for i in range(len(values)):
            total += values[i]
        sums[part] = total
    return sums.sum()
