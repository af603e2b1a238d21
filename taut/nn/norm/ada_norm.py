"""AdaNorm: layer normalisation whose gain is a decreasing function of the normalised value itself.

Source: Xu, Sun, Zhang, Zhao and Lin, Understanding and Improving Layer Normalization, 2019, arXiv:1911.07013.
Differs: nothing from the authors' code, which the paper's text leaves open in two places: the deviation is the unbiased
    one, and epsilon is added to it, outside the root.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from taut.nn.norm._precision import wide


class AdaNorm(nn.Module):
    """z = C (1 - k y) y with y = (x - mean) / (std + eps) over the last axis, for x [..., d]; no parameters.

    The factor C (1 - k y) is a constant to the backward pass.
    """

    exact_gradient = False

    def __init__(self, d: int, C: float = 1.0, k: float = 0.1, eps: float = 1e-5, *, unbiased: bool = True) -> None:
        super().__init__()
        self.d, self.C, self.k, self.eps, self.unbiased = d, C, k, eps, unbiased

    def forward(self, x: Tensor) -> Tensor:
        a = wide(x)
        deviation = a.std(-1, correction=int(self.unbiased), keepdim=True)
        y = (a - a.mean(-1, keepdim=True)) / (deviation + self.eps)
        factor = self.C * (1 - self.k * y.detach())
        return (factor * y).to(x.dtype)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield AdaNorm(24), (make(2, 3, 24),)
    yield AdaNorm(24, C=2.0, unbiased=False), (make(5, 24),)
