"""LayerNorm and the linear layer behind it, with the mean and the division both deferred past the product.

    y = (x weight^T - mean(x) sums) / sqrt(variance(x) + eps) + bias,    sums = the sum of each row of the weight

A gain and a bias of the norm's go into weight and bias (`fold_norm`).

Source: Salmani and Soloveychik, LLM inference acceleration via efficient operation fusion, 2025, arXiv:2502.17728,
section on LayerNorm.
Differs: the mean is taken off behind the product, with the sums of the weight as it is stored, so that no weight is
rounded again for being centred (the paper's form is `center_reader`); one rounding, as in `norm_linear`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._wide import wide
from taut.ops.layer_norm import layer_norm


@op
def layer_norm_linear(
    x: Float[Tensor, "*batch k"],
    weight: Float[Tensor, "n k"],
    bias: Float[Tensor, " n"] | None = None,
    eps: float = 1e-5,
    residual: Float[Tensor, "*batch n"] | None = None,
    sums: Float[Tensor, " n"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """layer_norm(x, eps) weight^T + bias + residual, rounded once to x's dtype.

    `sums`, float32, are those of the weight's rows; without them a kernel for more than one token takes them anew. One
    token is one kernel, more are a small one for mean and deviation and the product behind it.
    """
    y = layer_norm.reference(wide(x), eps=eps) @ wide(weight).mT
    y = y if bias is None else y + bias
    return (y if residual is None else y + residual).to(x.dtype)


@layer_norm_linear.least
def _(x, weight, bias=None, eps=1e-5, residual=None, sums=None) -> Work:
    tokens, n = x.numel() // x.shape[-1], weight.shape[0]
    return Work((2 * n + 5) * x.numel(), nbytes(x, weight, bias, residual) + tokens * n * x.element_size())


@layer_norm_linear.tests
def _(make):
    yield (make(3, 5, 64) + 1, make(40, 64), make(40)), {"residual": make(3, 5, 40)}
    yield (make(1, 77), make(300, 77)), {"eps": 1e-2}


@layer_norm_linear.impl("torch", when=lambda *args, **kwargs: None)
def _(x, weight, bias=None, eps=1e-5, residual=None, sums=None):
    y = torch.nn.functional.linear(torch.nn.functional.layer_norm(x, x.shape[-1:], eps=eps), weight, bias)
    return y if residual is None else y + residual


def _fits(x, weight, bias=None, eps=1e-5, residual=None, sums=None) -> Reason:
    if _gpu.many(x):
        return f"more than {_gpu.MOST_TOKENS} tokens: the vendor's product is faster"
    reason = _gpu.refuses_product(x, (weight,), (), bias, residual, sums)
    return reason or _gpu.slower("linear", x, weight)


@layer_norm_linear.impl("triton", when=_fits, opaque=True)
def _(x, weight, bias=None, eps=1e-5, residual=None, sums=None):
    flat, y = x.reshape(-1, x.shape[-1]), x.new_empty(*x.shape[:-1], weight.shape[0])
    rows = None if residual is None else residual.contiguous()
    of_few = _gpu.kernel("centred", "OF_FEW")
    config = of_few if 1 < len(flat) <= of_few.tokens else _gpu.chosen("linear", x, weight, summed=True)
    run = _gpu.kernel("centred", "project")
    return run(flat, weight, y, config, sums=sums, bias=bias, residual=rows, eps=eps)
