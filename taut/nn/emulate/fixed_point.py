"""Fixed-point arithmetic on int64 tensors: rounding shifts, leading ones, an inverse root by seed and Newton steps.

Source: Parhami, Computer Arithmetic: Algorithms and Hardware Designs, 2nd edition, 2010, chapters 16 and 21.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

FRACTION = 28
SEEDS = (round(2**-0.25 * 2**FRACTION), round(2**-0.75 * 2**FRACTION))


def to_fixed(x: Tensor, fraction_bits: int, bits: int = 32) -> Tensor:
    """round(x 2^fraction_bits), ties to even, saturated to signed `bits`-bit integers (held in int64)."""
    top = 2 ** (bits - 1)
    return (x.double() * 2.0**fraction_bits).round().clamp(-top, top - 1).long()


def from_fixed(codes: Tensor, fraction_bits: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return (codes.double() * 2.0**-fraction_bits).to(dtype)


def shift_round(x: Tensor, places: int | Tensor) -> Tensor:
    """x / 2^places rounded to nearest, ties upwards; `places` at least 1."""
    return (x + (torch.ones_like(x) << (places - 1))) >> places


def leading_one(x: Tensor) -> Tensor:
    """floor(log2 x) of integers in [1, 2^53]; what a leading-one detector gives."""
    return torch.frexp(x.double()).exponent.long() - 1


def shift(x: Tensor, places: Tensor) -> Tensor:
    """x 2^places for integer places of either sign, truncated."""
    return torch.where(places >= 0, x << places.clamp(min=0), x >> (-places).clamp(min=0))


def inverse_root(x: Tensor, steps: int = 2) -> tuple[Tensor, Tensor]:
    """(mantissa, exponent) with mantissa 2^-(FRACTION + exponent) close to 1 / sqrt(x), for integers x in [1, 2^53].

    The seed is one of two constants, by the parity of the leading one's place, and 19 % off at most; each Newton step
    takes a relative error r to 3/2 r^2.
    """
    place = leading_one(x)
    odd = place & 1
    mantissa = shift(x, FRACTION - (place - odd))
    y = torch.where(odd == 1, SEEDS[1], SEEDS[0])
    for _ in range(steps):
        square = (y * y) >> FRACTION
        y = (y * ((3 << FRACTION) - ((mantissa * square) >> FRACTION))) >> (FRACTION + 1)
    return y, (place - odd) >> 1


@dataclass(frozen=True)
class Report:
    """What a unit answered against the exact function, and what it did for one row.

    `guarantee_error`: the largest departure from the invariant that the unit is about (sum p - 1, sigma - 1).
    `operations`: how many of each kind for one row; `cycles`: clock cycles for one row, where published.
    """

    max_error: float
    rms_error: float
    guarantee_error: float
    operations: dict[str, int]
    cycles: int | None = None


def report(
    got: Tensor, exact: Tensor, guarantee_error: Tensor, operations: dict[str, int], cycles: int | None = None
) -> Report:
    """Compare a unit's answers with the exact ones, elementwise in float64."""
    error = got.double() - exact.double()
    worst = guarantee_error.double().abs().max().item()
    return Report(error.abs().max().item(), error.pow(2).mean().sqrt().item(), worst, operations, cycles)
