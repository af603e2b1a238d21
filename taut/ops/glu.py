"""Gated linear unit: one half, through an activation, multiplies the other.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 5 and 6.
"""

from __future__ import annotations

from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._activation import activation
from taut.ops._wide import wide


@op
def glu(gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"], act: str = "silu") -> Float[Tensor, "*batch d"]:
    """act(gate) * up; in float32 or wider, rounded once to gate's dtype. `act` is a name in `_activation`.

    Raises ValueError for an unknown activation.
    """
    return (activation(act)(wide(gate)) * wide(up)).to(gate.dtype)


@glu.least
def _(gate, up, act="silu") -> Work:
    return Work(5 * gate.numel(), 2 * nbytes(gate) + nbytes(up))


@glu.tests
def _(make):
    for act in ("silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh", "identity"):
        yield (make(3, 5, 64), make(3, 5, 64), act), {}
