"""A linear layer with everything that may stand around it in one pass: a norm before, an activation and a sum behind.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2 (norm and product as one); softcap:
Gemma 2, 2024, arXiv:2408.00118, section 2.
Differs: LayerNorm too; at decoding each thread computes the norm anew, which costs less than handing it on.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._activation import ACTIVATIONS, activation
from taut.ops._wide import wide


@op
def fused_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    eps: float | None = None,
    gain: Float[Tensor, " k"] | None = None,
    shift: Float[Tensor, " k"] | None = None,
    centred: bool = False,
    act: str | None = None,
    factor: float = 1.0,
    softcap: float | None = None,
    residual: Float[Tensor, "*batch n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """softcap(act(norm(x) weight^T + bias) * factor) + residual, rounded once to x's dtype.

    The norm is (x - mean if `centred`) / sqrt(mean of squares + eps) * gain + shift; there is none where `eps` is
    None. A `softcap` c is c tanh(y / c). Raises ValueError for an unknown activation.
    """
    y = normalized(x, eps, gain, shift, centred) @ wide(weight).mT
    y = y if bias is None else y + bias
    y = (y if act is None else activation(act)(y)) * factor
    y = y if softcap is None else softcap * torch.tanh(y / softcap)
    return (y if residual is None else y + residual).to(x.dtype)


def normalized(x: Tensor, eps: float | None, gain: Tensor | None, shift: Tensor | None, centred: bool) -> Tensor:
    """The norm in float32 or wider; x itself where eps is None."""
    h = wide(x)
    if eps is None:
        return h
    h = h - h.mean(-1, keepdim=True) if centred else h
    h = h * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps)
    h = h if gain is None else h * gain
    return h if shift is None else h + shift


@fused_linear.least
def _(
    x,
    weight,
    bias=None,
    eps=None,
    gain=None,
    shift=None,
    centred=False,
    act=None,
    factor=1.0,
    softcap=None,
    residual=None,
) -> Work:
    tokens, n = x.numel() // x.shape[-1], weight.shape[0]
    read = nbytes(x, weight, bias, gain, shift, residual)
    return Work((2 * n + 2) * x.numel() + 4 * tokens * n, read + tokens * n * x.element_size())


@fused_linear.tests
def _(make):
    x, weight, bias = make(3, 5, 64), make(40, 64), make(40)
    yield (x, weight, bias), {"act": "gelu_tanh"}
    yield (x, weight, None, 1e-5, make(64)), {"residual": make(3, 5, 40)}
    yield (x, weight, bias, 1e-5, make(64), make(64), True), {"factor": 0.3, "softcap": 2.0}
    for act in ACTIVATIONS:
        yield (x, weight), {"act": act}
