"""A fixed-point softmax whose probabilities sum to one exactly, however rough its exponential is.

Source: Choi, Kim and Kim, softmax and layer normalisation units with guaranteed normalisation for the edge, 2026,
    arXiv:2604.23647.
Differs: the paper's widths and tables were not at hand, so these are ours: scores with 8 fraction bits, a table of 32
    powers of two of 16 bits each, division by the sum of the *approximated* terms, and what a rounding leaves carried
    to the next entry, so that every probability is within one unit of its quotient and the sum is exact. No claim about
    the silicon, bit for bit.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from taut.nn.emulate.fixed_point import Report, leading_one, report, shift

SCORE_FRACTION = 8
TERM_BITS = 16
LOG2_E_FRACTION = 14
LOG2_E = round(math.log2(math.e) * 2**LOG2_E_FRACTION)


def _terms(x: Tensor, table: int) -> Tensor:
    """Integers close to 2^TERM_BITS e^(x - max) over the last axis: shift by the whole part, look the fraction up."""
    scores = (x.double() * 2**SCORE_FRACTION).round().clamp(min=-(2.0**23)).long()
    below = scores.amax(-1, keepdim=True) - scores
    exponent = (below * LOG2_E) >> LOG2_E_FRACTION
    whole, fraction = exponent >> SCORE_FRACTION, exponent & (2**SCORE_FRACTION - 1)
    middles = (torch.arange(table, dtype=torch.float64, device=x.device) + 0.5) / table
    powers = (2.0**TERM_BITS * torch.exp2(-middles)).round().long()
    return powers[(fraction * table) >> SCORE_FRACTION] >> whole.clamp(max=TERM_BITS + 1)


def softmax_codes(x: Tensor, bits: int = 16, table: int = 32, *, guarantee: bool = True) -> Tensor:
    """Softmax over the last axis as integers [..., n] that sum to 2^bits; masked scores are -inf.

    `guarantee=False` is the common unit: it multiplies by a reciprocal from a table of the same size, so that the sum
    drifts.
    """
    terms = _terms(x, table)
    total = terms.sum(-1, keepdim=True)
    if not guarantee:
        return _by_table(terms, total, bits, table)
    reached = (terms.cumsum(-1) << bits) // total
    return reached.diff(dim=-1, prepend=torch.zeros_like(total))


def _by_table(terms: Tensor, total: Tensor, bits: int, table: int) -> Tensor:
    """terms 2^bits / total, with the reciprocal of total's leading bits looked up."""
    place = leading_one(total)
    index = shift(total, TERM_BITS - place) - 2**TERM_BITS
    middles = 1 + (torch.arange(table, dtype=torch.float64, device=terms.device) + 0.5) / table
    reciprocal = (2.0**TERM_BITS / middles).round().long()[(index * table) >> TERM_BITS]
    return shift(terms * reciprocal, bits - TERM_BITS - place)


def softmax_q(x: Tensor, bits: int = 16, table: int = 32, *, guarantee: bool = True) -> Tensor:
    """Softmax of x [..., n] over the last axis by the unit, in x's dtype; no gradient. A row with NaN or infinity gives
    NaN, since no integer holds them."""
    x = x.detach()
    wrong = (x.isnan() | x.isposinf()).any(-1, keepdim=True)
    codes = softmax_codes(torch.where(wrong, 0, x), bits, table, guarantee=guarantee)
    return (codes.double() * 2.0**-bits).masked_fill(wrong, torch.nan).to(x.dtype)


class GuaranteedSoftmax(nn.Module):
    """`softmax_q` as a module, to be put into a model by `taut.rewrites.swap_norm`."""

    def __init__(self, bits: int = 16, table: int = 32, *, guarantee: bool = True) -> None:
        super().__init__()
        self.bits, self.table, self.guarantee = bits, table, guarantee

    def forward(self, x: Tensor) -> Tensor:
        return softmax_q(x, self.bits, self.table, guarantee=self.guarantee)


def operations(n: int) -> dict[str, int]:
    """Operations for a row of n scores."""
    return {"compare": n - 1, "add": 3 * n - 1, "multiply": n, "shift": 2 * n, "lookup": n, "divide": n}


def cycles(n: int) -> int:
    """Published latency of a row: n + 1 clock cycles."""
    return n + 1


def study(x: Tensor, bits: int = 16, table: int = 32, *, guarantee: bool = True) -> Report:
    """The unit against softmax in float64, on scores x [..., n]."""
    codes = softmax_codes(x, bits, table, guarantee=guarantee).double() * 2.0**-bits
    n = x.shape[-1]
    return report(codes, x.double().softmax(-1), codes.sum(-1) - 1, operations(n), cycles(n))
