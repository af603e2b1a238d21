"""RMSNorm and quantization to 8-bit floats, a scale a row, as one: the division goes into the scale.

    rms_norm(x) ~ codes * scale        codes = x * 448 / max|x|,  scale = max|x| / 448 / RMS(x)

The codes do not depend on the RMS, since the quantizer divides by a multiple of it anyway.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2, with the scalar left in the scale of
    a quantizer a row (ours); the format: Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, UInt8
from torch import Tensor

from taut.formats.minifloat import E4M3
from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._wide import wide


@op
def norm_fp8(
    x: Float[Tensor, "*batch d"], eps: float = 1e-6
) -> tuple[UInt8[Tensor, "*batch d"], Float[Tensor, " *batch"]]:
    """(codes, scale): the bits of float8_e4m3fn values which, times float32 scales, are x / sqrt(mean(x^2) + eps).

    A gain is to be folded into the next layer first.
    """
    h = wide(x)
    top = h.abs().amax(-1, keepdim=True).clamp_min(1e-30)
    values = (h * E4M3.largest / top).clamp(-E4M3.largest, E4M3.largest).to(torch.float8_e4m3fn)
    scale = top * torch.rsqrt(h.square().mean(-1, keepdim=True) + eps) / E4M3.largest
    return values.view(torch.uint8), scale.squeeze(-1).to(torch.promote_types(x.dtype, torch.float32))


@norm_fp8.least
def _(x, eps=1e-6) -> Work:
    return Work(5 * x.numel(), nbytes(x) + x.numel() + 4 * x.numel() // x.shape[-1])


@norm_fp8.tests
def _(make):
    yield (make(3, 5, 64),), {}
    yield (make(40, 1030),), {"eps": 1e-2}


def _fits(x, eps=1e-6) -> Reason:
    return _gpu.refuses_rows(x)


@norm_fp8.impl("triton", when=_fits, opaque=True)
def _(x, eps=1e-6):
    codes, scale = _gpu.kernel("quantized", "norm_fp8")(x.reshape(-1, x.shape[-1]), eps)
    return codes.view(x.shape), scale.view(x.shape[:-1])
