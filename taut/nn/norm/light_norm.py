"""LightNorm: a batch norm for training on small devices: range in place of variance, few bits, shared exponents.

Source: Noh et al., LightNorm: Area and Energy-Efficient Batch Normalization Hardware for On-Device DNN Training, 2022,
    arXiv:2211.02686; range batch norm after Banner et al., Scalable Methods for 8-bit Training, 2018, arXiv:1805.11046.
Differs: bit widths and group size are ours (10-bit input, 8-bit mantissas in groups of 16 channels), as no text at hand
    gives the paper's. The range is divided by its exact expectation for normal numbers, so that gain and bias mean what
    they mean in a batch norm; 1 / sqrt(2 ln n) differs from it by a nearly constant factor only. Gradients pass
    straight through the roundings and are not rounded themselves.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor, nn

from taut.formats.block_floating_point import bfp_quantize
from taut.formats.minifloat import Minifloat
from taut.nn.emulate.fixed_point import Report, report
from taut.nn.norm._precision import wide

FP10 = Minifloat("E5M4", 5, 4, 63488.0)


def expected_range(n: int, device: torch.device | None = None) -> Tensor:
    """E[max - min] of n standard normal numbers: the integral of 1 - F^n - (1 - F)^n over the line; float64 []."""
    points = torch.linspace(-12, 12, 2401, dtype=torch.float64, device=device)
    below, above = torch.special.ndtr(points), torch.special.ndtr(-points)
    return torch.trapezoid(1 - below**n - above**n, points)


def operations(n: int, chunks: int = 16) -> dict[str, int]:
    """Operations of a training forward for one channel of n values: no squares and no root, of which a batch norm
    takes n and one."""
    return {"compare": 2 * n, "add": 3 * n + chunks, "multiply": n, "divide": 1}


class RangeBatchNorm2d(nn.Module):
    """y = (x - mean) / s * weight + bias for x [N, C, H, W], with s a multiple of the channel's range.

    The N H W values of a channel are cut into `chunks`, whose ranges are averaged: one range of all of them is noisy
    (4.6 % at 65536 values, 17 % at 32) and follows a single outlier. What does not fill a chunk is left out of s.
    `running_scale` estimates the standard deviation, as the root of a batch norm's `running_var` does.
    """

    running_mean: Tensor
    running_scale: Tensor

    def __init__(self, features: int, eps: float = 1e-5, momentum: float = 0.1, *, chunks: int = 16) -> None:
        super().__init__()
        self.features, self.eps, self.momentum, self.chunks = features, eps, momentum, chunks
        self.weight = nn.Parameter(torch.ones(features))
        self.bias = nn.Parameter(torch.zeros(features))
        self.register_buffer("running_mean", torch.zeros(features))
        self.register_buffer("running_scale", torch.ones(features))

    def forward(self, x: Tensor) -> Tensor:
        if self.training:
            mean, scale = self._statistics(wide(x))
            self._remember(mean, scale)
        else:
            mean, scale = self.running_mean, self.running_scale
        gain = self.weight / (scale + self.eps)
        return ((wide(x) - mean[:, None, None]) * gain[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    def _statistics(self, x: Tensor) -> tuple[Tensor, Tensor]:
        values = x.transpose(0, 1).flatten(1)
        size = values.shape[1] // self.chunks
        if size < 2:
            raise ValueError(f"{values.shape[1]} values a channel do not fill {self.chunks} chunks; use fewer chunks")
        chunked = values[:, : size * self.chunks].unflatten(1, (self.chunks, size))
        spread = (chunked.amax(-1) - chunked.amin(-1)).mean(-1)
        return values.mean(-1), spread / expected_range(size, x.device).to(x.dtype)

    @torch.no_grad()
    def _remember(self, mean: Tensor, scale: Tensor) -> None:
        self.running_mean += self.momentum * (mean.to(self.running_mean.dtype) - self.running_mean)
        self.running_scale += self.momentum * (scale.to(self.running_scale.dtype) - self.running_scale)


class LightNorm2d(RangeBatchNorm2d):
    """Range batch norm on inputs rounded to `io`, its output in block floating point along the channels."""

    exact_gradient = False

    def __init__(
        self,
        features: int,
        eps: float = 1e-5,
        momentum: float = 0.1,
        *,
        chunks: int = 16,
        io: Minifloat = FP10,
        group: int = 16,
        mantissa_bits: int = 8,
    ) -> None:
        super().__init__(features, eps, momentum, chunks=chunks)
        self.io, self.group, self.mantissa_bits = io, group, mantissa_bits

    @property
    def bits_moved(self) -> float:
        """Bits a value that a training forward moves: written by the layer before, read back, written normalised (the
        statistics are taken while the layer before writes). A float32 batch norm moves 96."""
        return 2 * self.io.bits + self.mantissa_bits + 8 / self.group

    def forward(self, x: Tensor) -> Tensor:
        rounded = wide(x) + (self.io.round(wide(x)) - wide(x)).detach()
        y = super().forward(rounded)
        blocks = bfp_quantize(y.movedim(1, -1), self.group, self.mantissa_bits).movedim(-1, 1)
        return (y + (blocks - y).detach()).to(x.dtype)


def study(x: Tensor, norm: RangeBatchNorm2d) -> Report:
    """A training forward of `norm`, gain one and bias zero, against a batch norm in float64, on x [N, C, H, W]."""
    a = x.double()
    exact = (a - a.mean((0, 2, 3), keepdim=True)) / a.std((0, 2, 3), correction=0, keepdim=True)
    got = norm(x).detach().double()
    sigma = got.std((0, 2, 3), correction=0)
    return report(got, exact, sigma - 1, operations(x.numel() // x.shape[1], norm.chunks))


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield RangeBatchNorm2d(6, chunks=4), (make(2, 6, 4, 4),)
    yield RangeBatchNorm2d(6).eval(), (make(2, 6, 4, 4),)
    yield LightNorm2d(6, chunks=4), (make(2, 6, 4, 4),)
