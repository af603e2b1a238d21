"""Dynamic tanh, an elementwise stand-in for a norm.

Source: Zhu, Chen, He, LeCun and Liu, Transformers without Normalization, 2025, arXiv:2503.10622, eq. 1.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._wide import wide


@op
def dyt(
    x: Float[Tensor, "*batch d"],
    alpha: float | Tensor,
    gain: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
) -> Float[Tensor, "*batch d"]:
    """tanh(alpha * x) * gain + bias; in float32 or wider, rounded once to x's dtype.

    `alpha` is a number or a tensor that broadcasts to x.
    """
    h = torch.tanh(alpha * wide(x))
    h = h if gain is None else h * gain
    return (h if bias is None else h + bias).to(x.dtype)


@dyt.least
def _(x, alpha, gain=None, bias=None) -> Work:
    return Work(4 * x.numel(), 2 * nbytes(x) + nbytes(gain, bias))


@dyt.tests
def _(make):
    yield (make(3, 5, 64), 0.5), {}
    yield (make(4, 33), make(1), make(33), make(33)), {}
