"""RMSNorm and the linear layer behind it, with the division deferred past the product.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.
Differs: the unscaled product is never rounded: accumulated and scaled in float32 or wider, stored once.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import op
from taut.ops._weights import dequantize
from taut.ops._wide import wide
from taut.ops.inv_rms import inv_rms


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
