"""The scalar that RMSNorm multiplies a token by.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: handed out by itself, so that the multiplication can be done later (FlashNorm, arXiv:2407.09577).
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._wide import wide


@op
def inv_rms(x: Float[Tensor, "*batch d"], eps: float | Tensor = 1e-6) -> Float[Tensor, "*batch 1"]:
    """1 / sqrt(mean(x^2) + eps) along the last axis, in float32 or wider.

    `eps` is a number, or a tensor that broadcasts to `x[..., :1]`.
    """
    return torch.rsqrt(wide(x).square().mean(-1, keepdim=True) + eps)


@inv_rms.least
def _(x, eps=1e-6) -> Work:
    return Work(2 * x.numel(), nbytes(x) + x[..., :1].numel() * wide(x[..., :1]).element_size())


@inv_rms.tests
def _(make):
    yield (make(3, 5, 64),), {}
    yield (make(4, 33), make(4, 1).abs()), {}
