"""NVFP4: blocks of 16 four-bit floats with an E4M3 scale each, under one float32 scale for the whole tensor.

Source: Abecassis et al. (NVIDIA), Pretraining Large Language Models with NVFP4, 2025, arXiv:2509.25149.
Differs: every quotient is rounded once, from its real value (the paper multiplies by rounded reciprocals). Quotients
    are formed in float64: a float32 number over the product of a float32 scale and a block scale differs from a
    midpoint of the target format by at least 2**-37 of it, so float64's rounding never decides.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.formats.microscaling import Blocks, in_blocks
from taut.formats.minifloat import E2M1, E4M3


@dataclass(frozen=True)
class NVFP4:
    """E2M1 elements, E4M3 block scales and a float32 scale for the tensor, which takes its largest magnitude to the
    largest value that the two can hold."""

    block: int = 16

    @property
    def bits_per_value(self) -> float:
        return E2M1.bits + E4M3.bits / self.block

    def quantize(self, x: Tensor) -> Blocks:
        """x [..., d], finite, any floating dtype (float64 is rounded to float32 first). ValueError unless the block
        divides d."""
        elements, scales, scale = self._elements(x)
        return Blocks(E4M3.encode(scales).squeeze(-1), E2M1.encode(elements).flatten(-2), scale)

    def round(self, x: Tensor) -> Tensor:
        """What `dequantize(quantize(x))` gives, bit for bit and in x's dtype, without forming the codes."""
        elements, scales, scale = self._elements(x)
        return (elements * (scales * scale.double())).flatten(-2).to(x.dtype)

    def _elements(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Elements on their grid [..., d / block, block], the blocks' scales [..., d / block, 1], and the tensor's."""
        blocks = in_blocks(x.float().double(), self.block)
        absmax = blocks.abs().amax(-1, keepdim=True)
        scale = (absmax.amax() / (E2M1.largest * E4M3.largest)).float()
        per_tensor = torch.where(scale > 0, scale, 1.0).double()
        scales = E4M3.round(absmax / (E2M1.largest * per_tensor))
        step = scales * per_tensor
        return E2M1.round(torch.where(step > 0, blocks / step, 0.0)), scales, scale

    def dequantize(self, quantized: Blocks, dtype: torch.dtype = torch.float32) -> Tensor:
        """The values [..., d], rounded once to `dtype`. ValueError for blocks without a scale for the tensor."""
        if quantized.scale is None:
            raise ValueError("these blocks have no scale for the tensor: they are of another format")
        step = E4M3.decode(quantized.scales, torch.float64) * quantized.scale.double()
        values = E2M1.decode(in_blocks(quantized.codes, self.block), torch.float64) * step[..., None]
        return values.flatten(-2).to(dtype)
