"""Comparing two models with nothing of taut: both run as they are, in true float64."""

from __future__ import annotations

import copy

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

NARROW = {torch.float32, torch.bfloat16, torch.float16}


class Widened(TorchDispatchMode):
    """Models cast to float32 inside their norms; here such a cast keeps float64."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        args = [torch.float64 if isinstance(a, torch.dtype) and a in NARROW else a for a in args]
        if kwargs.get("dtype") in NARROW:
            kwargs = {**kwargs, "dtype": torch.float64}
        return func(*args, **kwargs)


def outputs(model: nn.Module, inputs: dict[str, torch.Tensor]) -> list[torch.Tensor]:
    """Every floating tensor that the model returns, computed in float64 from its parameters as they are."""
    wide = copy.deepcopy(model).double()
    for module in wide.modules():
        config = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation_internal"):
            config._experts_implementation_internal = "eager"
    inputs = {k: v.double() if v.is_floating_point() else v for k, v in inputs.items()}
    torch.set_default_dtype(torch.float64)
    try:
        with torch.no_grad(), Widened():
            result = wide(**inputs)
    finally:
        torch.set_default_dtype(torch.float32)
    return [t for t in tree_leaves(dict(result)) if isinstance(t, torch.Tensor) and t.is_floating_point()]


def distance(one: nn.Module, two: nn.Module, inputs: dict[str, torch.Tensor]) -> float:
    """Largest difference over largest value, over all outputs."""
    pairs = zip(outputs(one, inputs), outputs(two, inputs), strict=True)
    return max(((a - b).abs().max() / a.abs().max()).item() for a, b in pairs)
