"""Residual addition and the root-mean-square normalisation of the sum, in one pass.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: the sum is handed on too, rounded to x's dtype; the norm reads what was written.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taut.op import op
from taut.ops.rms_norm import rms_norm


@op
def add_rms_norm(
    x: Float[Tensor, "*batch d"],
    residual: Float[Tensor, "*batch d"],
    gain: Float[Tensor, " d"] | None = None,
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
    """(rms_norm(x + residual, gain, eps), x + residual), both in x's dtype."""
    total = (x + residual).to(x.dtype)
    return rms_norm.reference(total, gain, eps), total
