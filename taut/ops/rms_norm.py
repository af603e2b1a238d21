"""Root-mean-square normalisation.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: epsilon may be given per token, which keeps a cancelled norm exact; the gain multiplies before rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import op
from taut.ops._wide import wide


@op
def rms_norm(
    x: Float[Tensor, "*batch d"], gain: Float[Tensor, " d"] | None = None, eps: float | Tensor = 1e-6
) -> Float[Tensor, "*batch d"]:
    """x / sqrt(mean(x^2) + eps) * gain along the last axis; accumulated in float32 or wider, rounded once.

    `eps` is a number, or a tensor that broadcasts to `x[..., :1]`. The result has x's dtype.
    """
    h = wide(x)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    return (h if gain is None else h * gain).to(x.dtype)
