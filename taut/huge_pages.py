"""Tensors on the large pages of a processor, where Linux gives them: fewer addresses are translated, and memory is read
up to a fifth faster."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterable
from pathlib import Path
from threading import Thread

from torch import Tensor

SIZE = Path("/sys/kernel/mm/transparent_hugepage/hpage_pmd_size")
COLLAPSE = 25
"""MADV_COLLAPSE, which Linux has since 6.1: gather the pages of a range into a large one now."""


def collapse(tensors: Iterable[Tensor]) -> int:
    """Put what lies where these CPU tensors lie onto large pages, without a change to it; how many bytes are on some.

    0 where the system has none. It takes about as long as to write the memory for the first time.
    """
    if sys.platform != "linux" or not SIZE.exists():
        return 0
    size = int(SIZE.read_text())
    advise = ctypes.CDLL(None).madvise
    advise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    bounds = [(t.data_ptr() // size, -(-(t.data_ptr() + t.nbytes) // size)) for t in tensors]
    pages = dict.fromkeys(page for first, last in bounds for page in range(first, last))
    return size * sum(advise(page * size, size, COLLAPSE) == 0 for page in pages)


def collapse_meanwhile(tensors: Iterable[Tensor]) -> Thread:
    """The same beside whatever else is done, in the order of the tensors."""
    thread = Thread(target=collapse, args=(list(tensors),), daemon=True)
    thread.start()
    return thread
