"""Root-mean-square normalisation.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: epsilon may be given per token, which keeps a cancelled norm exact; the gain multiplies before rounding.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._cpu import address, dtype, norm, refusal, threads
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


@rms_norm.least
def _(x, gain=None, eps=1e-6) -> Work:
    return Work(4 * x.numel(), 2 * nbytes(x) + nbytes(gain))


@rms_norm.tests
def _(make):
    yield (make(3, 5, 64), make(64)), {}
    yield (make(4, 577),), {"eps": 1e-2}
    yield (make(40, 1030), make(1030)), {}
    yield (make(4, 33) * 1e-3, make(33), make(4, 1).abs()), {}


def _triton_fits(x, gain=None, eps=1e-6) -> Reason:
    return "eps is a tensor" if isinstance(eps, Tensor) else _gpu.refuses_rows(x, gain)


@rms_norm.impl("triton", when=_triton_fits, opaque=True)
def _(x, gain=None, eps=1e-6):
    y = torch.empty_like(x, memory_format=torch.contiguous_format)
    return _gpu.kernel("rows", "norm_rows")(x.reshape(-1, x.shape[-1]), gain, y, eps)


def _fits(x, gain=None, eps=1e-6) -> Reason:
    return "eps is a tensor" if isinstance(eps, Tensor) else refusal(x, gain)


@rms_norm.impl("numba", when=_fits, opaque=True)
def _(x, gain=None, eps=1e-6):
    y, d = torch.empty_like(x), x.shape[-1]
    places = x.data_ptr(), address(gain), y.data_ptr()
    norm("rms_norm", x.dtype, dtype(gain))(*places, x.numel() // d, d, threads(x.nbytes), eps)
    return y
