"""A read of memory at full speed."""

from __future__ import annotations

import numba as nb
import numpy as np

from taut.ops._numba.kernels import allocating, jit
from taut.ops._numba.parallel import shared
from taut.ops._numba.rows import NEAR, fetch_all
from taut.ops._numba.scalar import array, span
from taut.ops._numba.simd import ROOMY

BLOCK = 256
"""Floats of a stream that are asked for at once."""


@jit
def read_part(part, parts, address, count, sums):
    """The sum of a share, read at four places side by side, as `rows.streams` reads."""
    first, last = span(count, part, parts)
    each, total = (last - first) // 4, nb.float32(0)
    step = BLOCK if ROOMY else max(each, 1)
    for start in range(0, each, step):
        place, size = address + 4 * (first + start), min(step, each - start)
        for n in range(4 if ROOMY else 0):
            fetch_all(place + 4 * n * each + NEAR, 4 * size)
        a, b = array(place, size, np.float32(0)), array(place + 4 * each, size, np.float32(0))
        c, d = array(place + 8 * each, size, np.float32(0)), array(place + 12 * each, size, np.float32(0))
        for i in range(size):
            total += (a[i] + b[i]) + (c[i] + d[i])
    rest = array(address + 4 * (first + 4 * each), last - first - 4 * each, np.float32(0))
    for i in range(len(rest)):
        total += rest[i]
    sums[part] = total


share_read = shared(read_part)


@allocating
def read(address, count, parts):
    """The sum of `count` float32 values, by `parts` threads."""
    sums = np.zeros(parts, np.float32)
    share_read(parts, (address, count, sums))
    return sums.sum()
