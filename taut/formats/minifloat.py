"""Minifloats: floating-point formats of at most 8 bits, rounded to nearest even and saturating.

Source: Rouhani et al., OCP Microscaling Formats (MX) Specification v1.0, 2023, sections 5.3 and 6;
    Micikevicius et al., FP8 Formats for Deep Learning, 2022, arXiv:2209.05433, table 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor


def power_of_two(exponent: Tensor, dtype: torch.dtype) -> Tensor:
    """2**exponent without an error, for integer exponents in [-1022, 1023], in a dtype that can hold it.

    `torch.ldexp` goes through `pow`, which does not promise the exact power.
    """
    return ((exponent.long() + 1023) << 52).view(torch.float64).to(dtype)


def floor_log2(x: Tensor) -> Tensor:
    """floor(log2 |x|) as int32, exact for subnormal numbers too; -1100, less than any number's, where x is zero."""
    return (torch.frexp(x).exponent - 1).masked_fill(x == 0, -1100)


@dataclass(frozen=True)
class Minifloat:
    """Sign, `exponent_bits`, `mantissa_bits`; `largest` is the largest finite value (top codes may be taken by NaN)."""

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def least_exponent(self) -> int:
        """Exponent of the smallest normal number; subnormal numbers share it."""
        return 2 - 2 ** (self.exponent_bits - 1)

    @property
    def largest_exponent(self) -> int:
        return math.frexp(self.largest)[1] - 1

    def round(self, x: Tensor) -> Tensor:
        """The nearest value of the format, ties to the even code, saturating; same shape and dtype as `x`.

        `x` is float32 or float64: bfloat16 and float16 cannot hold the intermediate quotient.
        """
        steps = floor_log2(x).clamp(min=self.least_exponent) - self.mantissa_bits
        # Products with powers of two are exact on every device; quotients are not on all.
        rounded = (x * power_of_two(-steps, x.dtype)).round() * power_of_two(steps, x.dtype)
        return rounded.clamp(-self.largest, self.largest)

    def encode(self, x: Tensor) -> Tensor:
        """Codes (uint8) of values that lie on the format's grid: sign, exponent and mantissa fields from the top."""
        exponent = floor_log2(x).clamp(min=self.least_exponent)
        mantissa = (x.abs() * power_of_two(self.mantissa_bits - exponent, x.dtype)).long()
        magnitude = ((exponent.long() - self.least_exponent) << self.mantissa_bits) + mantissa
        sign = torch.signbit(x).long() << (self.bits - 1)
        return (sign | magnitude).to(torch.uint8)

    def decode(self, codes: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
        """Values of finite codes; exact in float32 and float64."""
        codes = codes.long()
        field = (codes >> self.mantissa_bits) & (2**self.exponent_bits - 1)
        mantissa = codes & (2**self.mantissa_bits - 1)
        mantissa = torch.where(field > 0, mantissa + 2**self.mantissa_bits, mantissa)
        exponent = (field - 1).clamp(min=0) + self.least_exponent - self.mantissa_bits
        magnitude = mantissa.to(dtype) * power_of_two(exponent, dtype)
        return torch.where(codes >> (self.bits - 1) == 1, -magnitude, magnitude)


E5M2 = Minifloat("E5M2", 5, 2, 57344.0)
E4M3 = Minifloat("E4M3", 4, 3, 448.0)
E3M2 = Minifloat("E3M2", 3, 2, 28.0)
E2M3 = Minifloat("E2M3", 2, 3, 7.5)
E2M1 = Minifloat("E2M1", 2, 1, 6.0)
