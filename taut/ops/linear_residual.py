"""Linear layer that adds into the residual stream and hands on the sum of squares of what it wrote.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.
Differs: the next norm's statistic comes from the writer, so that the norm reads nothing again.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import op
from taut.ops._weights import dequantize
from taut.ops._wide import wide


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
