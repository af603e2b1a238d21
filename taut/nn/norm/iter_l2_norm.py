"""IterL2Norm: layer normalisation without division and square root, by a few steps of a scalar iteration.

Source: Ye, Sim, Kim, Jin and Jeong, IterL2Norm: Fast Iterative L2-Normalization, 2024, arXiv:2412.04778.
Differs: the update's constants are ours, as the paper's were not at hand. With y = x - mean and m = sum y^2, the scalar
    a -> 1 / sqrt(m) starts at 2^-ceil(e / 2), e being m's exponent (m = f 2^e, 1/2 <= f < 1), so that a sqrt(m) starts
    in [1/2, 1). "flow" is the forward Euler step of da/dt = 1 - m a^2 with rate half the start value; "newton" the
    multiplicative step a (3 - m a^2) / 2; "fast_inverse" the bit trick with the same Newton step, for comparison.
    Largest relative errors: flow 2.7e-2 after 5 steps and 8.5e-4 after 10; newton 2.5e-2, 1.2e-6 and rounding after 3,
    5 and 7; fast_inverse 1.8e-3 after 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from taut.formats.minifloat import power_of_two
from taut.nn.emulate.fixed_point import Report, report
from taut.nn.norm._arguments import width

Scheme = Literal["newton", "flow", "fast_inverse"]
MAGIC = 0x5F3759DF


def _start(m: Tensor) -> Tensor:
    """2^-ceil(e / 2) for m = f 2^e: an adder and a shifter in hardware."""
    exponent = torch.frexp(m).exponent
    return power_of_two(-torch.div(exponent + 1, 2, rounding_mode="floor"), m.dtype)


def iter_rsqrt(m: Tensor, steps: int = 5, scheme: Scheme = "newton") -> Tensor:
    """1 / sqrt(m) for positive m of any floating dtype, every operation rounded to that dtype; m = 0 gives 0.

    Raises ValueError for an unknown scheme and TypeError for fast_inverse on anything but float32.
    """
    if scheme == "flow":
        a = start = _start(m)
        for _ in range(steps):
            a = a + 0.5 * start * (1 - m * a * a)
    elif scheme in ("newton", "fast_inverse"):
        a = _start(m) if scheme == "newton" else _bit_trick(m)
        for _ in range(steps):
            a = a * (1.5 - 0.5 * (m * a) * a)
    else:
        raise ValueError(f"unknown scheme {scheme!r}; it is newton, flow or fast_inverse")
    return a.masked_fill(m == 0, 0.0)


def _bit_trick(m: Tensor) -> Tensor:
    if m.dtype != torch.float32:
        raise TypeError(f"fast_inverse reads the bits of a float32, not of {m.dtype}; use scheme='newton'")
    return (MAGIC - (m.view(torch.int32) >> 1)).view(torch.float32)


def cycles(d: int) -> float:
    """Clock cycles for one row of d features: the straight line through the two published ends (116 at d = 64 and 227
    at d = 1024, 5 steps), about 8.6 features a cycle."""
    return 116 + (227 - 116) * (d - 64) / (1024 - 64)


def operations(d: int, steps: int = 5, scheme: Scheme = "newton") -> dict[str, int]:
    """Operations for a row of d features, gain and bias left out."""
    step = {"add": 2, "multiply": 4} if scheme == "flow" else {"add": 1, "multiply": 4}
    return {"add": 3 * d + steps * step["add"], "multiply": 2 * d + 2 + steps * step["multiply"], "shift": 1}


def study(x: Tensor, steps: int = 5, scheme: Scheme = "newton", dtype: torch.dtype | None = None) -> Report:
    """The unit without epsilon against layer normalisation in float64, on x [..., d]."""
    d = x.shape[-1]
    norm = IterL2Norm(d, 0.0, steps=steps, scheme=scheme, dtype=dtype).to(x.device)
    got = norm.normalised(x).double()
    a = x.double() - x.double().mean(-1, keepdim=True)
    exact = a / a.std(-1, correction=0, keepdim=True)
    return report(got, exact, got.std(-1, correction=0) - 1, operations(d, steps, scheme), round(cycles(d)))


class IterL2Norm(nn.Module):
    """y = sqrt(d) (x - mean) a * weight + bias with a from `iter_rsqrt`, over the last axis, for x [..., d].

    Drop-in for `torch.nn.LayerNorm(d)`. The statistics and the iteration run in `dtype` (default: x's own), each
    operation rounded to it. `eps` is added to the mean square, as in layer normalisation.
    """

    exact_gradient = False

    def __init__(
        self,
        d: int | Sequence[int],
        eps: float = 1e-5,
        *,
        steps: int = 5,
        scheme: Scheme = "newton",
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.d, self.eps, self.steps, self.dtype = width(d), eps, steps, dtype
        self.scheme: Scheme = scheme
        self.weight = nn.Parameter(torch.ones(self.d))
        self.bias = nn.Parameter(torch.zeros(self.d))

    def normalised(self, x: Tensor) -> Tensor:
        """y before weight and bias, in the dtype of the arithmetic."""
        a = x.to(self.dtype or x.dtype)
        a = a - a.mean(-1, keepdim=True)
        m = (a * a).sum(-1, keepdim=True) + self.d * self.eps
        return a * (iter_rsqrt(m, self.steps, self.scheme) * math.sqrt(self.d))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addcmul(self.bias, self.normalised(x).to(x.dtype), self.weight)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield IterL2Norm(24), (make(2, 3, 24),)
    yield IterL2Norm(24, steps=10, scheme="flow"), (make(5, 24),)
