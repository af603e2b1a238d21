"""BitLinear: a linear layer with ternary weights and 8-bit activations, whose product is one of integers.

Source: Zhu et al., Scalable MatMul-free Language Modeling, 2024, arXiv:2406.02528, section 3.1; ported to a
    chip by Abreu et al., Neuromorphic Principles for Efficient Large Language Models on Intel Loihi 2, 2025,
    arXiv:2503.18002.
Differs: the two scales multiply the finished integer product; the authors' code divides the codes before it.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.nn.norm._precision import wide
from taut.nn.norm.rms_norm import RMSNorm

LARGEST_INPUT = 2**17


def token_codes(x: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) with x close to codes * scale: whole numbers in [-128, 127] as floats, scale [..., 1]."""
    absmax = x.abs().amax(-1, keepdim=True).clamp(min=1e-5)
    return (x * (127 / absmax)).round().clamp(-128, 127), absmax / 127


def ternary_codes(weight: Tensor) -> tuple[Tensor, Tensor]:
    """(codes, scale) with weight close to codes * scale: codes in {-1, 0, 1} as floats, one scale []."""
    scale = weight.abs().mean().clamp(min=1e-5)
    return (weight / scale).round().clamp(-1, 1), scale


class _TernaryProduct(torch.autograd.Function):
    """Forward: integer product, then scales. Backward: that of a linear layer on the dequantized operands."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor) -> Tensor:
        codes, scale = token_codes(x)
        ternary, gamma = ternary_codes(weight)
        ctx.save_for_backward(codes * scale, ternary * gamma)
        return F.linear(codes, ternary) * (scale * gamma)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        (upstream,) = gradients
        x, weight = ctx.saved_tensors
        return upstream @ weight, upstream.flatten(0, -2).T @ x.flatten(0, -2)


class BitLinear(nn.Module):
    """y = ternary(W) int8(RMSNorm(x)), x [..., in_features] to [..., out_features]; no bias.

    Gradients pass straight through both quantizers. The codes are multiplied as float32, which is exact while
    128 in_features fits in 24 bits: raises ValueError above 131072.
    """

    def __init__(self, in_features: int, out_features: int, eps: float = 1e-8) -> None:
        super().__init__()
        if in_features > LARGEST_INPUT:
            raise ValueError(
                f"{in_features} inputs overflow float32's whole numbers; split the layer below {LARGEST_INPUT}"
            )
        self.norm = RMSNorm(in_features, eps)
        self.weight = nn.Parameter(torch.empty(out_features, in_features))
        nn.init.kaiming_uniform_(self.weight, a=5**0.5)

    def forward(self, x: Tensor) -> Tensor:
        return _TernaryProduct.apply(wide(self.norm(x)), wide(self.weight)).to(x.dtype)
