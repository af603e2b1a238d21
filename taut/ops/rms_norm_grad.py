"""The gradient of RMSNorm, from its input alone.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4 and section 4 (the
gradients); FlashNorm, 2024, arXiv:2407.09577 (the scalar of a row is all that the norm adds).
Differs: the row's scalar is taken again from the row, which must be read anyway, so that nothing but x is kept.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._wide import wide
from taut.ops.inv_rms import inv_rms


@op
def rms_norm_grad(
    dy: Float[Tensor, "*batch d"],
    x: Float[Tensor, "*batch d"],
    gain: Float[Tensor, " d"],
    eps: float = 1e-6,
) -> tuple[Float[Tensor, "*batch d"], Float[Tensor, " d"]]:
    """The gradients to x and to the gain of rms_norm(x, gain, eps), where dy is the one to its result.

    With n = x / rms(x) and t = dy gain: dx = (t - n mean(t n)) / rms(x), and dgain is the sum of dy n over all rows.
    Summed in float32 or wider; dx is rounded once to x's dtype, dgain to the gain's.
    """
    s = inv_rms.reference(x, eps)
    n, d = wide(x) * s, wide(dy)
    t = d * gain
    dx = s * (t - n * (t * n).mean(-1, keepdim=True))
    return dx.to(x.dtype), (d * n).reshape(-1, x.shape[-1]).sum(0).to(gain.dtype)


@rms_norm_grad.least
def _(dy, x, gain, eps=1e-6) -> Work:
    return Work(10 * x.numel(), nbytes(dy, x, x) + 2 * nbytes(gain))


@rms_norm_grad.tests
def _(make):
    yield (make(3, 5, 64), make(3, 5, 64), make(64)), {}
    yield (make(40, 77), make(40, 77), make(77)), {"eps": 1e-2}


def _fits(dy, x, gain, eps=1e-6) -> Reason:
    if dy.dtype != x.dtype:
        return f"x is {x.dtype}, dy is {dy.dtype}"
    return _gpu.refuses_rows(x, dy, gain)


@rms_norm_grad.impl("triton", when=_fits, opaque=True)
def _(dy, x, gain, eps=1e-6):
    d = x.shape[-1]
    dx = torch.empty_like(x, memory_format=torch.contiguous_format)
    run = _gpu.kernel("grads", "rms_norm_grad")
    return run(dy.reshape(-1, d), x.reshape(-1, d), gain, dx, eps, _gpu.processors(x.get_device()))
