"""A read of memory at full speed."""

from __future__ import annotations

import numba as nb
import numpy as np

from taut.ops._numba.kernels import jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.scalar import array, span


@jit
def read_part(part, parts, address, count, sums):
    """The sum of a share, read at four places side by side: the hardware follows each only a little way ahead."""
    first, last = span(count, part, parts)
    each, total = (last - first) // 4, nb.float32(0)
    place = address + 4 * first
    a, b = array(place, each, np.float32(0)), array(place + 4 * each, each, np.float32(0))
    c, d = array(place + 8 * each, each, np.float32(0)), array(place + 12 * each, each, np.float32(0))
    for i in range(each):
        total += (a[i] + b[i]) + (c[i] + d[i])
    rest = array(place + 16 * each, last - first - 4 * each, np.float32(0))
    for i in range(len(rest)):
        total += rest[i]
    sums[part] = total


share_read = shared(read_part)


@jit
def read(address, count, parts):
    """The sum of `count` float32 values, by `parts` threads."""
    sums = np.zeros(parts, np.float32)
    share_read(parts, (address, count, sums))
    return sums.sum()
