"""Dynamic tanh: an elementwise squashing in place of a normalisation; no statistic, nothing to reduce.

Source: Zhu, Chen, He, LeCun and Liu, Transformers without Normalization, 2025, arXiv:2503.10622.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn


class DyT(nn.Module):
    """y = weight * tanh(alpha x) + bias, for x [..., d]; alpha is one trained scalar."""

    def __init__(self, d: int, alpha: float = 0.5) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.tensor(alpha))
        self.weight = nn.Parameter(torch.ones(d))
        self.bias = nn.Parameter(torch.zeros(d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.weight + self.bias


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield DyT(24), (make(2, 3, 24),)
