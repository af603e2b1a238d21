"""Matrix product with a weight, as in every linear layer.

Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, section 3 (every projection); the weight
layout (out, in) is PyTorch's, https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import linear as product

from taut.op import op
from taut.ops._weights import dequantize


@op
def linear(
    x: Float[Tensor, "*batch k"],
    weight: Shaped[Tensor, "n k_stored"],
    bias: Float[Tensor, " n"] | None = None,
    scale: Float[Tensor, " n *groups"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """x weight^T + bias.

    `weight` is floating point (n, k); with a `scale` it is int8 (n, k) with a scale a row, or int4 packed into uint8
    (n, k / 2) with a scale a group of 32 inputs. Raises ValueError where weight and scale do not fit together.
    """
    return product(x, weight if scale is None else dequantize(weight, scale, x.dtype), bias)
