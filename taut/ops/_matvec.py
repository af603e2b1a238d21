"""How the linear ops call their kernels: products of a few tokens with a weight in any stored format."""

from __future__ import annotations

import torch
from torch import Tensor

from taut.op import Reason, nbytes
from taut.ops._cpu import FLOATS, address, kernel, refusal, tag, threads
from taut.ops._weights import GROUP

MOST_TOKENS = 16


def refuses_product(x: Tensor, weight: Tensor, scale: Tensor | None, *others: Tensor | None) -> Reason:
    """Why the kernels cannot multiply these, or None."""
    k = x.shape[-1]
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    if x.numel() > MOST_TOKENS * k:
        return f"more than {MOST_TOKENS} tokens"
    if x.numel() == 0 or weight.numel() == 0:
        return "nothing to multiply"
    if (scale is None) != (weight.dtype in FLOATS):
        return f"a {weight.dtype} weight {'without' if scale is None else 'with'} a scale"
    if weight.dtype == torch.uint8 and k % GROUP:
        return f"{k} inputs are no multiple of {GROUP}"
    if weight.shape[1] != (k // 2 if weight.dtype == torch.uint8 else k):
        return f"a weight of {tuple(weight.shape)} does not take {k} inputs"
    return refusal(x, weight, scale, *others)


def refuses_torch(x: Tensor, *weights: Tensor) -> Reason:
    """Why the op may not be put together from torch's own products, or None."""
    if x.dtype not in FLOATS:
        return f"x is {x.dtype}"
    return None if all(w.dtype == x.dtype for w in weights) else "the weight is stored in another format than x"


def matvec(
    x: Tensor,
    weight: Tensor,
    scale: Tensor | None,
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    squares: Tensor | None = None,
) -> Tensor:
    """x weight^T + bias + residual, of rms_norm(x, gain, eps) where eps is given; `squares` takes the sums of y^2."""
    n, k = weight.shape[0], x.shape[-1]
    tokens = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    read = address(x), address(weight), address(scale), address(gain), address(bias), address(residual)
    written = address(y), address(squares)
    tags = tag(x), tag(weight), tag(scale), tag(gain), tag(bias)
    sizes = tokens, k, n, eps is not None, eps or 0.0, threads(nbytes(weight))
    kernel("products", "linear")(*read, *written, *sizes, *tags)
    return y
