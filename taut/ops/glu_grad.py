"""The gradient of a gated linear unit.

Source: Shazeer, GLU Variants Improve Transformer, 2020, arXiv:2002.05202, eq. 5 and 6.
Differs: both gradients in one pass.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._activation import ACTIVATIONS, activation
from taut.ops._wide import wide


@op
def glu_grad(
    dy: Float[Tensor, "*batch d"], gate: Float[Tensor, "*batch d"], up: Float[Tensor, "*batch d"], act: str = "silu"
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, "*batch d"]]:
    """The gradients to gate and up of act(gate) * up, where dy is the one to it; in float32 or wider, rounded once.

    Raises ValueError for an unknown activation.
    """
    d = wide(dy)
    value_and_slope = torch.func.jvp(activation(act), (wide(gate),), (torch.ones_like(d),))
    return (d * wide(up) * value_and_slope[1]).to(gate.dtype), (d * value_and_slope[0]).to(up.dtype)


@glu_grad.least
def _(dy, gate, up, act="silu") -> Work:
    return Work(10 * dy.numel(), nbytes(dy) + 2 * nbytes(gate, up))


@glu_grad.tests
def _(make):
    for act in ACTIVATIONS:
        yield (make(3, 5, 64), make(3, 5, 64), make(3, 5, 64), act), {}


def _fits(dy, gate, up, act="silu") -> Reason:
    if gate.dtype not in (*_gpu.HALVES, torch.float32) or not dy.dtype == gate.dtype == up.dtype:
        return f"dy is {dy.dtype}, gate is {gate.dtype}, up is {up.dtype}"
    if act not in ACTIVATIONS:
        return f"no activation {act!r}"
    return "nothing to differentiate" if dy.numel() == 0 else _gpu.refusal(dy, gate, up)


@glu_grad.impl("triton", when=_fits, opaque=True)
def _(dy, gate, up, act="silu"):
    dense = [t.contiguous() for t in (dy, gate, up)]
    return _gpu.kernel("grads", "glu_grad")(*dense, torch.empty_like(dense[1]), torch.empty_like(dense[2]), act)
