"""CRMSNorm: the RMSNorm of a zero-mean vector that is stored without its last, redundant feature.

Source: Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, arXiv:2305.14858.
Differs: epsilon stands inside the root, as in the authors' code.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from taut.nn.norm._precision import wide


def compress(x: Tensor) -> Tensor:
    """[..., d] with zero mean to [..., d - 1]: the last feature is minus the sum of the others."""
    return x[..., :-1]


def decompress(x: Tensor) -> Tensor:
    """[..., d - 1] back to [..., d]."""
    return torch.cat([x, -x.sum(-1, keepdim=True)], -1)


class CRMSNorm(nn.Module):
    """y = x / sqrt((sum x^2 + (sum x)^2) / d + eps) for x [..., d - 1]; `d` counts the feature that is not stored."""

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.d, self.eps = d, eps

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        square = a.pow(2).sum(-1, keepdim=True) + a.sum(-1, keepdim=True).pow(2)
        return (a * torch.rsqrt(square / self.d + self.eps)).to(x.dtype)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield CRMSNorm(25), (make(2, 3, 24),)
