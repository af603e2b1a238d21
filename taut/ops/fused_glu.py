"""The gated half of a feed-forward in one pass: the norm before it, both products, the activation and the product.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.2; Shazeer, GLU Variants Improve
Transformer, 2020, arXiv:2002.05202, eq. 5 and 6.
Differs: LayerNorm and biases too.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._activation import ACTIVATIONS, activation
from taut.ops._wide import wide
from taut.ops.fused_linear import normalized


@op
def fused_glu(
    x: Float[Tensor, "*batch k"],
    gate: Float[Tensor, "n k"],
    up: Float[Tensor, "n k"],
    act: str = "silu",
    gate_bias: Float[Tensor, " n"] | None = None,
    up_bias: Float[Tensor, " n"] | None = None,
    eps: float | None = None,
    gain: Float[Tensor, " k"] | None = None,
    shift: Float[Tensor, " k"] | None = None,
    centred: bool = False,
) -> Float[Tensor, "*batch n"]:
    """act(h gate^T + gate_bias) * (h up^T + up_bias) with h = norm(x) as in `fused_linear`, rounded once.

    Raises ValueError for an unknown activation.
    """
    h = normalized(x, eps, gain, shift, centred)
    g, u = h @ wide(gate).mT, h @ wide(up).mT
    g = g if gate_bias is None else g + gate_bias
    u = u if up_bias is None else u + up_bias
    return (activation(act)(g) * u).to(x.dtype)


@fused_glu.least
def _(x, gate, up, act="silu", gate_bias=None, up_bias=None, eps=None, gain=None, shift=None, centred=False) -> Work:
    tokens, n = x.numel() // x.shape[-1], gate.shape[0]
    read = nbytes(x, gate, up, gate_bias, up_bias, gain, shift)
    return Work((4 * n + 2) * x.numel() + 5 * tokens * n, read + tokens * n * x.element_size())


@fused_glu.tests
def _(make):
    for act in ACTIVATIONS:
        yield (make(2, 3, 64), make(40, 64), make(40, 64), act), {"eps": 1e-5, "gain": make(64)}
    biases = {"gate_bias": make(40), "up_bias": make(40), "shift": make(64), "gain": make(64), "centred": True}
    yield (make(2, 3, 64), make(40, 64), make(40, 64), "gelu"), biases | {"eps": 1e-5}
