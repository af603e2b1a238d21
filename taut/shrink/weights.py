"""Random weights that hide nothing: no gain is one, no bias zero, no activation vanishes or saturates."""

from __future__ import annotations

import itertools
import math

import torch
from torch import Tensor, nn


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Perturb every vector around its initial value; redraw every matrix so that it roughly keeps its input's scale."""
    for module in model.modules():
        for p in module._parameters.values():
            if p is not None and p.is_floating_point():
                p.copy_(_vector(p) if p.numel() == max(p.shape, default=1) else _matrix(module, p))
        _fill_tables(module)


def _fill_tables(module: nn.Module) -> None:
    """Fill saved tables of experts, one row an id, that only a checkpoint would: no row has an expert twice."""
    experts = getattr(module, "num_experts", None)
    for name, table in module.named_buffers(recurse=False):
        empty = table.ndim == 2 and not table.is_floating_point() and not bool(table.any())
        if empty and isinstance(experts, int) and name not in module._non_persistent_buffers_set:
            table.copy_(torch.rand(len(table), experts).argsort(-1)[:, : table.shape[1]])


@torch.no_grad()
def settle(model: nn.Module, inputs: dict[str, Tensor], seed: int) -> None:
    """Give batch norms the statistics of the inputs, perturbed: with made-up ones a deep stack of them dies out."""
    norms = [m for m in model.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm) and m.running_var is not None]
    momenta = [m.momentum for m in norms]
    if not norms:
        return
    for norm in norms:
        norm.train().momentum = 1.0
    model(**inputs)
    generator = torch.Generator().manual_seed(seed)
    for norm, momentum in zip(norms, momenta, strict=True):
        norm.eval().momentum = momentum
        for statistic in filter(torch.is_tensor, (norm.running_mean, norm.running_var)):
            statistic.mul_(0.7 + 0.6 * torch.rand(statistic.shape, generator=generator))


def cast_weights(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Cast parameters and saved buffers; tables that the code computes in float32 stay as they are."""
    saved = model.state_dict(keep_vars=True)
    buffers = (buffer for name, buffer in model.named_buffers() if name in saved)
    for tensor in itertools.chain(model.parameters(), buffers):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _vector(p: Tensor) -> Tensor:
    """What is not trained, such as a bias that balances experts, is small: with a large one some are never chosen."""
    noise = torch.randn_like(p).clamp(-2, 2)
    size = 0.3 if bool((p == 1).all()) else 0.2
    return torch.nan_to_num(p) + (size if p.requires_grad else 0.1 * size) * noise


def _matrix(module: nn.Module, p: Tensor) -> Tensor:
    if _is_structured(p):
        return p + 0.1 * torch.randn_like(p)
    if isinstance(module, nn.Embedding):
        return 0.5 * torch.randn_like(p)
    fan_in = math.prod(p.shape[1:]) if hasattr(module, "kernel_size") else max(p.shape[-2:])
    return 0.8 / math.sqrt(fan_in) * torch.randn_like(p)


def _is_structured(p: Tensor) -> bool:
    """An initial value that is not noise around zero, such as a state-space model's decay rates."""
    mean, std = p.mean().item(), p.std(correction=0).item()
    return math.isfinite(std) and abs(mean) > max(std / 2, 1e-6)
