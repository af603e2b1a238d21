"""DetachNorm: layer normalisation whose mean and deviation are constants to the backward pass.

Source: Xu, Sun, Zhang, Zhao and Lin, Understanding and Improving Layer Normalization, 2019, arXiv:1911.07013.

The paper's theorem: let the gradient that arrives have mean g and variance D over the features, and let sigma be the
deviation. What leaves has, with both detached, mean g / sigma and variance D / sigma^2; with the mean attached, mean 0;
with the deviation attached, variance at most D / sigma^2.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from taut.nn.norm._precision import wide


class DetachNorm(nn.Module):
    """y = (x - mean) / sqrt(var + eps) over the last axis, for x [..., d]; the statistics carry no gradient."""

    exact_gradient = False

    def __init__(self, d: int, eps: float = 1e-5, *, detach_mean: bool = True, detach_deviation: bool = True) -> None:
        super().__init__()
        self.d, self.eps, self.detach_mean, self.detach_deviation = d, eps, detach_mean, detach_deviation

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        mean = a.mean(-1, keepdim=True)
        deviation = (a.var(-1, correction=0, keepdim=True) + self.eps).sqrt()
        mean = mean.detach() if self.detach_mean else mean
        deviation = deviation.detach() if self.detach_deviation else deviation
        return ((a - mean) / deviation).to(x.dtype)


def gradient_moments(norm: Callable[[Tensor], Tensor], x: Tensor, upstream: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and variance over the features, [...] each, of the gradient that `norm` passes to x [..., d] when
    `upstream` [..., d] arrives at its output."""
    x = x.detach().requires_grad_()
    (gradient,) = torch.autograd.grad(norm(x), x, upstream)
    return gradient.mean(-1), gradient.var(-1, correction=0)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield DetachNorm(24), (make(2, 3, 24),)
    yield DetachNorm(24, detach_mean=False), (make(2, 3, 24),)
