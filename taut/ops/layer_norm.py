"""Layer normalisation.

Source: Ba, Kiros and Hinton, Layer Normalization, 2016, arXiv:1607.06450, eq. 3.
Differs: gain and bias apply before rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor, empty_like

from taut.op import Reason, Work, nbytes, op
from taut.ops._cpu import norm, refusal, threads
from taut.ops._wide import wide


@op
def layer_norm(
    x: Float[Tensor, "*batch d"],
    gain: Float[Tensor, " d"] | None = None,
    bias: Float[Tensor, " d"] | None = None,
    eps: float | Tensor = 1e-5,
) -> Float[Tensor, "*batch d"]:
    """(x - mean) / sqrt(variance + eps) * gain + bias along the last axis; in float32 or wider, rounded once.

    The variance is the biased one. `eps` is a number, or a tensor that broadcasts to `x[..., :1]`. The result has x's
    dtype.
    """
    h = wide(x)
    h = h - h.mean(-1, keepdim=True)
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h if gain is None else h * gain
    return (h if bias is None else h + bias).to(x.dtype)


@layer_norm.least
def _(x, gain=None, bias=None, eps=1e-5) -> Work:
    return Work(7 * x.numel(), 2 * nbytes(x) + nbytes(gain, bias))


@layer_norm.tests
def _(make):
    yield (make(3, 5, 64) + 1, make(64), make(64)), {}
    yield (make(4, 577), make(577)), {"eps": 1e-2}
    yield (make(4, 33),), {"bias": make(33)}
    yield (make(40, 1030),), {}
    yield (torch.cat([make(5, 1) + 300, make(5, 300)], -1),), {}


def _fits(x, gain=None, bias=None, eps=1e-5) -> Reason:
    return "eps is a tensor" if isinstance(eps, Tensor) else refusal(x, gain, bias)


@layer_norm.impl("numba", when=_fits, opaque=True)
def _(x, gain=None, bias=None, eps=1e-5):
    y, d = empty_like(x), x.shape[-1]
    # without `address` and `dtype`: of few rows, their calls would take a tenth of torch's whole layer_norm
    norm("layer_norm", x.dtype, None if gain is None else gain.dtype, None if bias is None else bias.dtype)(
        x.data_ptr(),
        0 if gain is None else gain.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        y.data_ptr(),
        x.numel() // d,
        d,
        threads(x.nbytes),
        eps,
    )
    return y
