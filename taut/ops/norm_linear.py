"""RMSNorm and the linear layer behind it, with the division deferred past the product.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.
Differs: the unscaled product is never rounded: accumulated and scaled in float32 or wider, stored once.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._matvec import matvec, refuses_product, refuses_torch
from taut.ops._training import NormLinear, wants_gradient
from taut.ops._weights import dequantize, quantize
from taut.ops._wide import wide
from taut.ops.inv_rms import inv_rms
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm


@op
def norm_linear(
    x: Float[Tensor, "*batch k"],
    weight: Shaped[Tensor, "n k_stored"],
    gain: Float[Tensor, " k"] | None = None,
    bias: Float[Tensor, " n"] | None = None,
    eps: float | Tensor = 1e-6,
    residual: Float[Tensor, "*batch n"] | None = None,
    scale: Float[Tensor, " n *groups"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """rms_norm(x, gain, eps) weight^T + bias + residual, rounded once to x's dtype.

    `weight` and `scale` as in `linear`; `eps` is a number, or a tensor that broadcasts to `x[..., :1]`.
    """
    h = wide(x)
    h = h if gain is None else h * gain
    y = h @ dequantize(weight, scale, h.dtype).mT * inv_rms.reference(x, eps)
    y = y if bias is None else y + bias
    return (y if residual is None else y + residual).to(x.dtype)


@norm_linear.least
def _(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None) -> Work:
    tokens, n = x.numel() // x.shape[-1], weight.shape[0]
    read = nbytes(x, weight, gain, bias, residual, scale)
    return Work((2 * n + 2) * x.numel(), read + tokens * n * x.element_size())


@norm_linear.tests
def _(make):
    yield (make(3, 5, 64), make(40, 64), make(64), make(40)), {"residual": make(3, 5, 40)}
    yield (make(1, 77), make(300, 77)), {"eps": 1e-2}
    yield (make(2, 32), make(8, 32), None, None, make(2, 1).abs()), {}
    for bits in (8, 4):
        weight, scale = quantize(make(24, 96), bits)
        yield (make(7, 96), weight, make(96)), {"scale": scale}


def _fits(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None) -> Reason:
    if isinstance(eps, Tensor):
        return "eps is a tensor"
    if residual is not None and residual.dtype != x.dtype:
        return "x and residual differ in dtype"
    return refuses_product(x, weight, scale, gain, bias, residual)


def _torch_fits(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None) -> Reason:
    return refuses_torch(x, weight)


@norm_linear.impl("torch", when=_torch_fits)
def _(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None):
    if wants_gradient(x, weight, gain, bias) and not isinstance(eps, Tensor):
        y = NormLinear.apply(x, weight, gain, bias, eps)
    else:
        y = linear(rms_norm(x, gain, eps), weight, bias)
    return y if residual is None else y + residual


def _triton_fits(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None) -> Reason:
    if isinstance(eps, Tensor):
        return "eps is a tensor"
    if gain is not None and _gpu.many(x):
        return "a gain that is not folded into the weight, and many tokens"
    reason = _gpu.refuses_product(x, (weight,), (scale,), gain, bias, residual)
    return reason or _gpu.slower("linear", x, weight)


@norm_linear.impl("triton", when=_triton_fits, opaque=True)
def _(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None):
    flat = x.reshape(-1, x.shape[-1])
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = None if residual is None else residual.contiguous()
    config = _gpu.chosen("linear", x, weight)
    _gpu.kernel("launch", "project")(flat, weight, y, config, gain=gain, bias=bias, residual=rows, eps=eps)
    return y


@norm_linear.impl("numba", when=_fits, opaque=True)
def _(x, weight, gain=None, bias=None, eps=1e-6, residual=None, scale=None):
    return matvec(x, weight, scale, gain, bias, residual, eps)
