"""Inverse standard deviation of every token: what a LayerNorm multiplies its centred input by.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, eq. 3.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._wide import wide


@op
def inv_std(x: Float[Tensor, "*batch d"], eps: float | Tensor = 1e-5) -> Float[Tensor, "*batch 1"]:
    """1 / sqrt(variance + eps) along the last axis, the biased variance; in float32 or wider, and returned so."""
    h = wide(x)
    h = h - h.mean(-1, keepdim=True)
    return (h.square().mean(-1, keepdim=True) + eps).rsqrt()


@inv_std.least
def _(x, eps=1e-5) -> Work:
    rows = x.numel() // x.shape[-1]
    return Work(4 * x.numel(), nbytes(x) + rows * max(4, x.element_size()))


@inv_std.tests
def _(make):
    yield (make(3, 5, 64) + 1,), {}
    yield (make(4, 577),), {"eps": 1e-2}
    yield (make(4, 33),), {"eps": make(4, 1).abs()}
