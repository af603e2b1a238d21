"""RMSNorm of a vector whose mean is zero and which is stored without its last feature, minus the sum of the others.

Source: Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, arXiv:2305.14858, section 3.2.
Differs: epsilon stands inside the root, as in the authors' code; the last feature can be had back, for a gain or an
output that needs it.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._wide import wide


@op
def crms_norm(
    x: Float[Tensor, "*batch stored"],
    gain: Float[Tensor, " d"] | None = None,
    eps: float = 1e-6,
    whole: bool = False,
) -> Float[Tensor, "*batch features"]:
    """x / sqrt((sum(x^2) + sum(x)^2) / d + eps) along the last axis, where d is one more than x has features.

    With `whole` or a gain the result has all d features, else d - 1. Accumulated in float32 or wider, rounded once to
    x's dtype.
    """
    h = wide(x)
    last = -h.sum(-1, keepdim=True)
    square = (h.square().sum(-1, keepdim=True) + last.square()) / (x.shape[-1] + 1)
    h = torch.cat((h, last), -1) if whole or gain is not None else h
    h = h * torch.rsqrt(square + eps)
    return (h if gain is None else h * gain).to(x.dtype)


@crms_norm.least
def _(x, gain=None, eps=1e-6, whole=False) -> Work:
    rows = x.numel() // x.shape[-1]
    restored = rows if whole or gain is not None else 0
    return Work(5 * x.numel(), 2 * nbytes(x) + restored * x.element_size() + nbytes(gain))


@crms_norm.tests
def _(make):
    yield (make(3, 5, 63),), {}
    yield (make(4, 24),), {"whole": True, "eps": 1e-2}
    yield (make(2, 32), make(33)), {}
