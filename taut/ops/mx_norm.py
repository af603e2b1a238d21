"""MXNorm's forward: x over its RMS in MXFP8, the RMS estimated from the block maxima that the quantizer needs anyway.

Source: McLean, Prince, Payot, Balanca and Luschi, MXNorm, 2026, arXiv:2603.13180, with p = 2.
Differs: epsilon stands inside the power mean. `exact` takes the RMS itself, from the same pass over x.
"""

from __future__ import annotations

from jaxtyping import Float, UInt8
from torch import Tensor

from taut.formats.microscaling import MXFP8, in_blocks
from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._wide import wide


@op
def mx_norm(
    x: Float[Tensor, "*batch d"], c: float, eps: float = 1e-6, exact: bool = False
) -> tuple[UInt8[Tensor, "*batch blocks"], UInt8[Tensor, "*batch d"]]:
    """(scales [*batch, d / 32], codes): E8M0 and E4M3 of x / RMS(x), d a multiple of 32.

    RMS(x) is c sqrt(mean of m^2 + eps) over the magnitudes m of the blocks of 32, or sqrt(mean of x^2 + eps).
    """
    h = wide(x)
    if exact:
        rms = (h.square().mean(-1, keepdim=True) + eps).sqrt()
    else:
        maxima = in_blocks(h, MXFP8.block).abs().amax(-1)
        rms = c * (maxima.square().mean(-1, keepdim=True) + eps).sqrt()
    blocks = MXFP8.quantize(h * (1 / rms))
    return blocks.scales, blocks.codes


@mx_norm.least
def _(x, c, eps=1e-6, exact=False) -> Work:
    return Work(6 * x.numel(), nbytes(x) + x.numel() + x.numel() // MXFP8.block)


@mx_norm.tests
def _(make):
    yield (make(3, 5, 64), 0.4183), {}
    yield (make(40, 1056), 0.4183), {"eps": 1e-2, "exact": True}


def _fits(x, c, eps=1e-6, exact=False) -> Reason:
    return _gpu.refuses_rows(x)


@mx_norm.impl("triton", when=_fits, opaque=True)
def _(x, c, eps=1e-6, exact=False):
    d = x.shape[-1]
    scales, codes = _gpu.kernel("quantized", "mx_norm")(x.reshape(-1, d), c, eps, exact)
    return scales.view(*x.shape[:-1], d // MXFP8.block), codes.view(x.shape)
