"""Microscaling formats: blocks of 32 minifloats that share one power of two (MXFP8, MXFP6, MXFP4).

Source: Rouhani et al., Microscaling Data Formats for Deep Learning, 2023, arXiv:2310.10537, algorithm 1;
    OCP Microscaling Formats (MX) Specification v1.0, 2023, section 6.3.
Differs: the specification leaves blocks with NaN or infinity open; here such a block gets the NaN scale.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from taut.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat, floor_log2, power_of_two

SCALE_BIAS = 127
SCALE_NAN = 255


class Blocks(NamedTuple):
    """`scales`: uint8 [..., d / block], scale codes. `codes`: uint8 [..., d], one element code a byte. `scale`: a
    float32 [] for the whole tensor, where the format has one."""

    scales: Tensor
    codes: Tensor
    scale: Tensor | None = None


class BlockFormat(Protocol):
    """A format of short floats in blocks along the last axis, each block with a scale."""

    @property
    def block(self) -> int: ...
    def quantize(self, x: Tensor) -> Blocks: ...
    def dequantize(self, quantized: Blocks, dtype: torch.dtype = torch.float32) -> Tensor: ...
    def round(self, x: Tensor) -> Tensor: ...


def in_blocks(x: Tensor, block: int) -> Tensor:
    """View [..., d] as [..., d / block, block]. Raises ValueError where d is no multiple of the block."""
    if x.shape[-1] % block:
        raise ValueError(f"{x.shape[-1]} features do not divide into blocks of {block}; pad them with zeros")
    return x.unflatten(-1, (-1, block))


@dataclass(frozen=True)
class MX:
    """Elements of one minifloat format in blocks of `block`, each block with an E8M0 scale."""

    element: Minifloat
    block: int = 32

    @property
    def bits_per_value(self) -> float:
        return self.element.bits + 8 / self.block

    def quantize(self, x: Tensor) -> Blocks:
        """x [..., d], any floating dtype. The shared exponent is that of the block's largest magnitude, less the
        element format's own; what then exceeds the element format saturates. ValueError unless the block divides d."""
        values, exponent, finite = self._elements(x)
        codes = self.element.encode(torch.where(finite, values, 0.0))
        scales = (exponent + SCALE_BIAS).masked_fill(~finite, SCALE_NAN)
        return Blocks(scales.squeeze(-1).to(torch.uint8), codes.flatten(-2))

    def round(self, x: Tensor) -> Tensor:
        """What `dequantize(quantize(x))` gives, bit for bit and in x's dtype, without forming the codes."""
        values, exponent, finite = self._elements(x)
        return torch.where(finite, values * power_of_two(exponent, values.dtype), torch.nan).flatten(-2).to(x.dtype)

    def _elements(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements on their grid [..., d / block, block], and of each block [..., d / block, 1] the shared exponent and
        whether all of it is finite."""
        blocks = in_blocks(x if x.dtype == torch.float64 else x.float(), self.block)
        absmax = blocks.abs().amax(-1, keepdim=True)
        exponent = (floor_log2(absmax) - self.element.largest_exponent).clamp(-SCALE_BIAS, SCALE_BIAS)
        return self.element.round(blocks * power_of_two(-exponent, blocks.dtype)), exponent, absmax.isfinite()

    def dequantize(self, quantized: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., d] in `dtype`; exact in float32 and float64."""
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        scale = power_of_two(quantized.scales.long() - SCALE_BIAS, exact)
        scale = scale.masked_fill(quantized.scales == SCALE_NAN, torch.nan)
        values = self.element.decode(in_blocks(quantized.codes, self.block), exact) * scale[..., None]
        return values.flatten(-2).to(dtype)


MXFP8 = MX(E4M3)
MXFP8_E5M2 = MX(E5M2)
MXFP6 = MX(E2M3)
MXFP6_E3M2 = MX(E3M2)
MXFP4 = MX(E2M1)
