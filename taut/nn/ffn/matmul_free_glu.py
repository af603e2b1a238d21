"""The gated feed-forward block of the MatMul-free language model: a SwiGLU of BitLinear layers.

Source: Zhu et al., Scalable MatMul-free Language Modeling, 2024, arXiv:2406.02528, section 3.3.
"""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor, nn

from taut.nn.ffn.bit_linear import BitLinear


class MatMulFreeGLU(nn.Module):
    """y = down(silu(gate) * up) with (gate, up) from one layer, for x [..., d]; inner width 8 d / 3, up to a multiple
    of 256, unless `hidden` is given."""

    def __init__(self, d: int, hidden: int | None = None) -> None:
        super().__init__()
        hidden = hidden or 256 * math.ceil(8 * d / (3 * 256))
        self.gate_up = BitLinear(d, 2 * hidden)
        self.down = BitLinear(hidden, d)

    def forward(self, x: Tensor) -> Tensor:
        gate, up = self.gate_up(x).chunk(2, -1)
        return self.down(F.silu(gate) * up)
