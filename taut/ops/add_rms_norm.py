"""Residual addition and the root-mean-square normalisation of the sum, in one pass.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: the sum is handed on too, rounded to x's dtype; the norm reads what was written.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._cpu import address, dtype, norm, refusal, threads
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


@add_rms_norm.least
def _(x, residual, gain=None, eps=1e-6) -> Work:
    return Work(5 * x.numel(), 4 * nbytes(x) + nbytes(gain))


@add_rms_norm.tests
def _(make):
    yield (make(3, 5, 64), make(3, 5, 64), make(64)), {}
    yield (make(40, 1030), make(40, 1030)), {"eps": 1e-2}


def _triton_fits(x, residual, gain=None, eps=1e-6) -> Reason:
    if x.dtype != residual.dtype or x.shape != residual.shape:
        return "x and residual differ in dtype or shape"
    return _gpu.refuses_rows(x, residual, gain)


@add_rms_norm.impl("triton", when=_triton_fits, opaque=True)
def _(x, residual, gain=None, eps=1e-6):
    y, total = (torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(2))
    d = x.shape[-1]
    _gpu.kernel("rows", "add_norm_rows")(x.reshape(-1, d), residual.reshape(-1, d), gain, total, y, eps)
    return y, total


def _fits(x, residual, gain=None, eps=1e-6) -> Reason:
    if x.dtype != residual.dtype or x.shape != residual.shape:
        return "x and residual differ in dtype or shape"
    return refusal(x, residual, gain)


@add_rms_norm.impl("numba", when=_fits, opaque=True)
def _(x, residual, gain=None, eps=1e-6):
    y, total, d = torch.empty_like(x), torch.empty_like(x), x.shape[-1]
    places = x.data_ptr(), residual.data_ptr(), address(gain), y.data_ptr(), total.data_ptr()
    norm("add_rms_norm", x.dtype, dtype(gain))(*places, x.numel() // d, d, threads(2 * x.nbytes), eps)
    return y, total
