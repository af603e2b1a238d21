"""What stands between a tensor and a kernel of `_triton`: who may call it."""

from __future__ import annotations

from functools import cache
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

HALVES = (torch.bfloat16, torch.float16)
MOST_TOKENS = 64
"""For more tokens the vendor's product is faster than ours (benchmarks/LOG.md)."""
WIDEST = 2**14
"""Features of a row that a kernel holds at once."""


def refusal(*tensors: Tensor | None) -> str | None:
    """Why no Triton kernel may run on these tensors, or None."""
    for t in tensors:
        if t is None:
            continue
        if not t.is_cuda:
            return f"a tensor is on {t.device.type}"
        if t.requires_grad and torch.is_grad_enabled():
            return "a gradient is asked for"
        if t.stride(-1) != 1:
            return "a tensor's features are not contiguous"
    return _missing()


@cache
def _missing() -> str | None:
    """What this machine lacks to run the kernels, or None."""
    if find_spec("triton") is None:
        return "Triton is not installed"
    major, minor = torch.cuda.get_device_capability()
    return None if major >= 9 else f"a GPU of compute capability {major}.{minor}; the kernels need 9.0"


@cache
def kernel(module: str, name: str) -> Any:
    """Something of `_triton`, imported at its first use: Triton need not be installed, and takes long to import."""
    return getattr(import_module(f"taut.ops._triton.{module}"), name)


def refuses_product(
    x: Tensor, weights: tuple[Tensor, ...], stored: tuple[Any, ...], *others: Tensor | None
) -> str | None:
    """Why no Triton kernel may multiply these, or None; `stored` holds what says that a weight is quantized."""
    if x.dtype not in HALVES:
        return f"x is {x.dtype}"
    if any(w.dtype != x.dtype for w in weights) or any(s is not None for s in stored):
        return "the weight is stored in another format than x"
    if x.numel() == 0 or weights[0].numel() == 0:
        return "nothing to multiply"
    return refusal(x, *weights, *others)


@cache
def processors(index: int) -> int:
    """How many multiprocessors a device has."""
    return torch.cuda.get_device_properties(index).multi_processor_count


def refuses_rows(x: Tensor, *others: Tensor | None) -> str | None:
    """Why no Triton kernel may run over the rows of x, or None."""
    if x.dtype not in (*HALVES, torch.float32):
        return f"x is {x.dtype}"
    if x.numel() == 0 or x.shape[-1] > WIDEST:
        return f"x is {tuple(x.shape)}"
    return refusal(x, *others)


def chosen(kind: str, x: Tensor, weight: Tensor, alone: bool = False, summed: bool = False) -> Any:
    """The configuration measured to be the fastest for a product of x with a weight, or why there is none, in words.

    `alone` is for a product without a norm, which has to beat the vendor's product alone; `summed` for one whose
    programs do as much with their input as if they added two.
    """
    n, k = weight.shape
    device = kernel("choice", "device_name")(x.get_device())
    return kernel("choice", "choose")(kind, x.numel() // k, n, k, device, alone, summed)


def slower(kind: str, x: Tensor, weight: Tensor, alone: bool = False) -> str | None:
    """Why the vendor's product serves a call better than a kernel of ours, or None."""
    config = chosen(kind, x, weight, alone)
    return config if isinstance(config, str) else None


def many(x: Tensor) -> bool:
    """Whether x holds so many tokens that the product is the vendor's, and only what stands around it is ours."""
    return x.numel() > MOST_TOKENS * x.shape[-1]
