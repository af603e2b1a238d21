"""A fixed-point layer normalisation whose output has standard deviation one, however rough its inverse root is.

Source: Choi, Kim and Kim, softmax and layer normalisation units with guaranteed normalisation for the edge, 2026,
    arXiv:2604.23647.
Differs: the paper's widths and steps were not at hand, so these are ours: 24-bit inputs under one power of two a row
    (which layer normalisation does not see), 20 bits after centring, an inverse root by leading one and two Newton
    steps, and one more such step on the variance *measured at the output*, which is what makes the promise good. There
    is no epsilon: a constant row gives zeros. No claim about the silicon, bit for bit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from taut.formats.minifloat import floor_log2, power_of_two
from taut.nn.emulate.fixed_point import (
    FRACTION,
    Report,
    from_fixed,
    inverse_root,
    leading_one,
    report,
    shift,
    shift_round,
)
from taut.nn.norm._arguments import width

INPUT_BITS = 24
CENTRED_BITS = 20
OUTPUT_GUARD = 6
ROOT_FRACTION = 10


def layer_norm_codes(x: Tensor, fraction_bits: int = 8, steps: int = 2, *, guarantee: bool = True) -> Tensor:
    """Integers [..., d]: (x - mean) / sigma over the last axis with `fraction_bits` (4 to 14) fraction bits.

    The output's own standard deviation is within 2^-fraction_bits of one. Raises ValueError where d or fraction_bits
    would overflow 64-bit intermediates.
    """
    d = x.shape[-1]
    if d > 2**13 or not 4 <= fraction_bits <= 14:
        raise ValueError(f"the unit takes at most 8192 features and 4 to 14 fraction bits, not {d} and {fraction_bits}")
    centred = _centred(x)
    square = (centred * centred).sum(-1, keepdim=True)
    mantissa, exponent = inverse_root(square.clamp(min=1), steps)
    # 1 / sigma = sqrt(d) / sqrt(square); the root of d is a constant of the layer
    inverse = (mantissa * round(math.sqrt(d) * 2**ROOT_FRACTION)) >> ROOT_FRACTION
    y = shift(centred * inverse, fraction_bits + OUTPUT_GUARD - FRACTION - exponent)
    if guarantee:
        y = _corrected(y, fraction_bits + OUTPUT_GUARD)
    return shift_round(y, OUTPUT_GUARD)


def _centred(x: Tensor) -> Tensor:
    """A multiple of x - mean, as integers of CENTRED_BITS: d x - sum(x) needs no division, hence no rounded mean."""
    largest = floor_log2(x.double().abs().amax(-1, keepdim=True)).clamp(min=-900)
    codes = (x.double() * power_of_two(INPUT_BITS - 2 - largest, torch.float64)).round().long()
    centred = codes * x.shape[-1] - codes.sum(-1, keepdim=True)
    place = leading_one(centred.abs().amax(-1, keepdim=True).clamp(min=1))
    return shift(centred, CENTRED_BITS - 2 - place)


def _corrected(y: Tensor, fraction: int) -> Tensor:
    """y times (3 - v) / 2, with v its measured variance: a Newton step towards deviation one."""
    variance = (y * y).sum(-1, keepdim=True) // y.shape[-1]
    factor = ((3 << (2 * fraction)) - variance) >> (fraction - 2)
    return (y * factor) >> (fraction + 3)


def operations(d: int, steps: int = 2) -> dict[str, int]:
    """Operations for a row of d features, gain and bias left out."""
    return {"add": 4 * d + steps, "multiply": 5 * d + 3 * steps + 1, "shift": 4 * d + 3, "lookup": 1}


def cycles(d: int) -> int:
    """Published latency of a row: d + 1 clock cycles."""
    return d + 1


def study(x: Tensor, fraction_bits: int = 8, steps: int = 2, *, guarantee: bool = True) -> Report:
    """The unit against layer normalisation in float64 without epsilon, on x [..., d]."""
    got = from_fixed(layer_norm_codes(x, fraction_bits, steps, guarantee=guarantee), fraction_bits, torch.float64)
    a = x.double() - x.double().mean(-1, keepdim=True)
    exact = a / a.std(-1, correction=0, keepdim=True)
    sigma = got.std(-1, correction=0)
    return report(got, exact, sigma - 1, operations(x.shape[-1], steps), cycles(x.shape[-1]))


class GuaranteedLayerNorm(nn.Module):
    """Layer normalisation of x [..., d] by the unit, then weight and bias; drop-in for `torch.nn.LayerNorm(d)` in
    evaluation: no gradient passes to x. A row that is not finite, which no integer holds, gives NaN."""

    exact_gradient = False

    def __init__(
        self, d: int | Sequence[int], *, fraction_bits: int = 8, steps: int = 2, guarantee: bool = True
    ) -> None:
        super().__init__()
        self.fraction_bits, self.steps, self.guarantee = fraction_bits, steps, guarantee
        self.weight = nn.Parameter(torch.ones(width(d)))
        self.bias = nn.Parameter(torch.zeros(width(d)))

    def forward(self, x: Tensor) -> Tensor:
        finite = x.detach().isfinite().all(-1, keepdim=True)
        rows = torch.where(finite, x.detach(), 0)
        codes = layer_norm_codes(rows, self.fraction_bits, self.steps, guarantee=self.guarantee)
        y = from_fixed(codes, self.fraction_bits, x.dtype).masked_fill(~finite, torch.nan)
        return torch.addcmul(self.bias, y, self.weight)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield GuaranteedLayerNorm(24), (make(2, 3, 24),)
    yield GuaranteedLayerNorm(24, fraction_bits=12), (make(5, 24),)
