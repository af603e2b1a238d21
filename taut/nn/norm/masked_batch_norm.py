"""Batch normalisation over sequences of unequal length: padded frames neither enter the statistics nor move them.

Source: Song et al., FusionFormer: Fusing Operations in Transformer for Efficient Streaming Speech Recognition, 2022,
    arXiv:2210.17079, which puts batch norms into a Conformer so that they fold into the layers before them.
Differs: the paper does not say how padded frames are treated; counting them makes the statistics depend on the padding.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from taut.nn.norm._precision import wide


class MaskedBatchNorm(nn.BatchNorm1d):
    """`torch.nn.BatchNorm1d` with an optional mask in training: x [N, C, L], mask bool [N, L], True where a frame is
    real. Without a mask, and in evaluation, it is the parent. Raises ValueError for fewer than two real frames."""

    def forward(self, input: Tensor, mask: Tensor | None = None) -> Tensor:
        if mask is None or not self.training:
            return super().forward(input)
        mean, var, count = self._statistics(input, mask)
        self._remember(mean, var * count / (count - 1))
        y = (wide(input) - mean[:, None]) * torch.rsqrt(var + self.eps)[:, None]
        if self.affine:
            y = y * self.weight[:, None] + self.bias[:, None]
        return y.to(input.dtype)

    def _statistics(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean [C] and biased variance [C] over the real frames, and their number."""
        real, count = mask[:, None], mask.sum()
        if not torch.compiler.is_compiling() and not mask.is_meta and count < 2:
            raise ValueError(f"batch statistics need at least 2 real frames, the mask has {int(count)}")
        mean = torch.where(real, wide(x), 0).sum((0, 2)) / count
        var = torch.where(real, wide(x) - mean[:, None], 0).pow(2).sum((0, 2)) / count
        return mean, var, count

    @torch.no_grad()
    def _remember(self, mean: Tensor, var: Tensor) -> None:
        if self.running_mean is None or self.running_var is None or self.num_batches_tracked is None:
            return
        self.num_batches_tracked += 1
        rate = self.momentum if self.momentum is not None else 1 / self.num_batches_tracked
        self.running_mean += rate * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_var += rate * (var.to(self.running_var.dtype) - self.running_var)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    mask = make(3, 5).new_ones(3, 5, dtype=torch.bool).tril(2)
    yield MaskedBatchNorm(8), (make(3, 8, 5), mask)
    yield MaskedBatchNorm(8).eval(), (make(3, 8, 5),)
