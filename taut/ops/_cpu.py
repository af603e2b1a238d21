"""What stands between a tensor and a kernel of `_numba`: who may call it, addresses, dtypes, threads."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from importlib import import_module
from inspect import signature
from typing import Any

import numpy as np
import torch
from torch import Tensor, is_grad_enabled

TAGS = {
    torch.float32: np.float32(0),
    torch.bfloat16: np.uint16(0),
    torch.float16: np.int16(0),
    torch.int8: np.int8(0),
    torch.uint8: np.uint8(0),
    torch.bool: np.uint8(0),
}
FLOAT = TAGS[torch.float32]
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
ONE_THREAD = 1 << 16
"""Bytes read below which waking the other threads costs more than it saves."""


def refusal(*tensors: Tensor | None, strided: bool = False) -> str | None:
    """Why no kernel may run on these tensors, or None: another device, a gradient, gaps between the elements."""
    graded = is_grad_enabled()
    for t in tensors:
        if t is None:
            continue
        if not t.is_cpu:
            return f"a tensor is on {t.device.type}"
        if graded and t.requires_grad:
            return "a gradient is asked for"
        if not strided and not t.is_contiguous():
            return "a tensor is not contiguous"
        if t.dtype not in TAGS:
            return f"a tensor is {t.dtype}"
    return None


def address(t: Tensor | None) -> int:
    """Where the tensor lies; 0 for none."""
    return 0 if t is None else t.data_ptr()


def dtype(t: Tensor | None) -> torch.dtype | None:
    return None if t is None else t.dtype


def tag(t: Tensor | None):
    """A scalar whose type tells numba how the tensor is stored."""
    return TAGS[torch.float32 if t is None else t.dtype]


def threads(nbytes: int) -> int:
    """How many threads should share work that reads so many bytes."""
    return 1 if nbytes < ONE_THREAD or not kernel("parallel", "HAS_OPENMP") else torch.get_num_threads()


@cache
def kernel(module: str, name: str) -> Any:
    """A kernel of `_numba`, imported at its first use, since numba takes half a second to import."""
    return getattr(import_module(f"taut.ops._numba.{module}"), name)


@cache
def norm(name: str, *dtypes: torch.dtype | None) -> Callable[..., None]:
    """A kernel of `_numba.norms` for tensors of these dtypes, None for no tensor; called with what follows their tags.

    numba would choose it by the types of all arguments at every call, which takes longer than a row.
    """
    from numba import float64, int64, typeof

    found, tags = kernel("norms", name), [FLOAT if dtype is None else TAGS[dtype] for dtype in dtypes]
    numbers = len(signature(found.py_func).parameters) - len(tags) - 1
    return partial(found.compile((*map(typeof, tags), *[int64] * numbers, float64)), *tags)
