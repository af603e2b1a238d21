"""Mean of squares along the features.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4 (under the root).
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._wide import wide


@op
def mean_square(x: Float[Tensor, "*batch d"]) -> Float[Tensor, "*batch 1"]:
    """mean(x^2) along the last axis, in float32 or wider."""
    return wide(x).square().mean(-1, keepdim=True)


@mean_square.least
def _(x) -> Work:
    return Work(2 * x.numel(), nbytes(x) + x[..., :1].numel() * wide(x[..., :1]).element_size())


@mean_square.tests
def _(make):
    yield (make(3, 5, 64),), {}
    yield (make(7) * 1e-3,), {}
