"""Linear layer that adds into the residual stream and hands on the sum of squares of what it wrote.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.
Differs: the next norm's statistic comes from the writer, so that the norm reads nothing again.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._matvec import matvec, refuses_product, refuses_torch
from taut.ops._weights import dequantize, quantize
from taut.ops._wide import wide
from taut.ops.linear import linear


@op
def linear_residual(
    x: Float[Tensor, "*batch k"],
    weight: Shaped[Tensor, "n k_stored"],
    residual: Float[Tensor, "*batch n"],
    bias: Float[Tensor, " n"] | None = None,
    scale: Float[Tensor, " n *groups"] | None = None,
) -> tuple[Float[Tensor, "*batch n"], Float[Tensor, "*batch 1"]]:
    """(y, sum of y^2 along the last axis) with y = x weight^T + bias + residual.

    y is rounded once to residual's dtype; its squares are summed as written, in float32 or wider. `weight` and `scale`
    as in `linear`.
    """
    h = wide(x)
    y = h @ dequantize(weight, scale, h.dtype).mT + residual
    y = (y if bias is None else y + bias).to(residual.dtype)
    return y, wide(y).square().sum(-1, keepdim=True)


@linear_residual.least
def _(x, weight, residual, bias=None, scale=None) -> Work:
    tokens, n = x.numel() // x.shape[-1], weight.shape[0]
    written = nbytes(residual) + tokens * wide(residual[..., :1]).element_size()
    return Work(2 * n * x.numel() + 2 * tokens * n, nbytes(x, weight, residual, bias, scale) + written)


@linear_residual.tests
def _(make):
    yield (make(3, 5, 64), make(40, 64), make(3, 5, 40), make(40)), {}
    yield (make(1, 77), make(300, 77), make(1, 300)), {}
    for bits in (8, 4):
        weight, scale = quantize(make(24, 96), bits)
        yield (make(7, 96), weight, make(7, 24)), {"scale": scale}


def _fits(x, weight, residual, bias=None, scale=None) -> Reason:
    if residual.dtype != x.dtype:
        return "x and residual differ in dtype"
    return refuses_product(x, weight, scale, residual, bias)


def _torch_fits(x, weight, residual, bias=None, scale=None) -> Reason:
    return refuses_torch(x, weight, residual)


@linear_residual.impl("torch", when=_torch_fits)
def _(x, weight, residual, bias=None, scale=None):
    y = linear(x, weight, bias) + residual
    return y, wide(y).square().sum(-1, keepdim=True)


def _triton_fits(x, weight, residual, bias=None, scale=None) -> Reason:
    if residual.dtype != x.dtype:
        return "x and residual differ in dtype"
    reason = _gpu.refuses_product(x, (weight,), (scale,), residual, bias)
    if reason is None and bias is not None and _gpu.many(x):
        return "a bias, and more tokens than our own product serves"
    return reason or (None if _gpu.many(x) else _gpu.slower("linear", x, weight))


@linear_residual.impl("triton", when=_triton_fits, opaque=True)
def _(x, weight, residual, bias=None, scale=None):
    flat = x.reshape(-1, x.shape[-1])
    if _gpu.many(x):
        y = torch.addmm(residual.reshape(-1, residual.shape[-1]), flat, weight.mT).view(residual.shape)
    else:
        y = torch.empty_like(residual, memory_format=torch.contiguous_format)
        config = _gpu.chosen("linear", x, weight)
        _gpu.kernel("launch", "project")(flat, weight, y, config, bias=bias, residual=residual.contiguous())
    squares = _gpu.kernel("rows", "row_squares")(y.view(-1, y.shape[-1]))
    return y, squares.view(*y.shape[:-1], 1)


@linear_residual.impl("numba", when=_fits, opaque=True)
def _(x, weight, residual, bias=None, scale=None):
    squares = torch.empty(*x.shape[:-1], 1)
    return matvec(x, weight, scale, None, bias, residual, None, squares), squares
