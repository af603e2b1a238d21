"""RMSNorm and the gated half of a feed-forward behind it, with the division deferred past both products.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.2.
Differs: with an activation that is not homogeneous the scalar is put in right before it; one rounding at the end.
"""

from __future__ import annotations

from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import op
from taut.ops._activation import activation
from taut.ops._weights import dequantize
from taut.ops._wide import wide
from taut.ops.inv_rms import inv_rms


@op
def norm_glu(
    x: Float[Tensor, "*batch k"],
    gate: Shaped[Tensor, "n k_stored"],
    up: Shaped[Tensor, "n k_stored"],
    gain: Float[Tensor, " k"] | None = None,
    eps: float | Tensor = 1e-6,
    act: str = "silu",
    gate_scale: Float[Tensor, " n *groups"] | None = None,
    up_scale: Float[Tensor, " n *groups"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """act(h gate^T) * (h up^T) with h = rms_norm(x, gain, eps), rounded once to x's dtype.

    The weights and their scales as in `linear`; `eps` is a number, or a tensor that broadcasts to `x[..., :1]`.
    Raises ValueError for an unknown activation.
    """
    h = wide(x)
    h = h if gain is None else h * gain
    s = inv_rms.reference(x, eps)
    g = h @ dequantize(gate, gate_scale, h.dtype).mT * s
    u = h @ dequantize(up, up_scale, h.dtype).mT * s
    return (activation(act)(g) * u).to(x.dtype)
