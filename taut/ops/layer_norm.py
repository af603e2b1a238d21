"""Layer normalisation.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, eq. 3.
Differs: gain and bias apply before rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import op
from taut.ops._wide import wide


@op
def layer_norm(
    x: Float[Tensor, "*batch d"],
    gain: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    eps: float = 1e-5,
) -> Float[Tensor, "*batch d"]:
    """(x - mean) / sqrt(variance + eps) * gain + bias along the last axis; in float32 or wider, rounded once.

    The variance is the biased one. The result has x's dtype.
    """
    h = wide(x)
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h if gain is None else h * gain
    return (h if bias is None else h + bias).to(x.dtype)
