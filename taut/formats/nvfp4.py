"""NVFP4: blocks of 16 four-bit floats with an E4M3 scale each, under one float32 scale for the whole tensor.

Source: Abecassis et al. (NVIDIA), Pretraining Large Language Models with NVFP4, 2025, arXiv:2509.25149.
Differs: every quotient is rounded once, from its real value (the paper multiplies by rounded reciprocals). Quotients
    are formed in float64: a float32 number over the product of a float32 scale and a block scale differs from a
    midpoint of the target format by at least 2**-37 of it, so float64's rounding never decides.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from taut.formats.microscaling import in_blocks
from taut.formats.minifloat import E2M1, E4M3

BLOCK = 16


class NVFP4Blocks(NamedTuple):
    """`scale`: float32 [], `scales`: uint8 [..., d / 16], E4M3 codes, `codes`: uint8 [..., d], one a byte."""

    scale: Tensor
    scales: Tensor
    codes: Tensor


def quantize(x: Tensor) -> NVFP4Blocks:
    """x [..., d], any floating dtype (float64 is rounded to float32 first). Raises ValueError unless 16 divides d."""
    blocks = in_blocks(x.float().double(), BLOCK)
    absmax = blocks.abs().amax(-1)
    scale = (absmax.amax() / (E2M1.largest * E4M3.largest)).float()
    per_tensor = torch.where(scale > 0, scale, 1.0).double()
    scales = E4M3.round(absmax / (E2M1.largest * per_tensor))
    step = (scales * per_tensor)[..., None]
    codes = E2M1.round(torch.where(step > 0, blocks / step, 0.0))
    return NVFP4Blocks(scale, E4M3.encode(scales), E2M1.encode(codes).flatten(-2))


def dequantize(quantized: NVFP4Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
    """The values [..., d], rounded once to `dtype`."""
    step = E4M3.decode(quantized.scales, torch.float64) * quantized.scale.double()
    values = E2M1.decode(in_blocks(quantized.codes, BLOCK), torch.float64) * step[..., None]
    return values.flatten(-2).to(dtype)
