"""Root-mean-square normalisation, on all features or on the first few, with the conventions that differ spelt out.

Source: Zhang and Sennrich, Root Mean Square Layer Normalization, 2019, arXiv:1910.07467, eq. 4.
Differs: the authors' code adds epsilon (1e-8) to the root, Llama and its descendants inside (1e-6, the default here).
    Gemma multiplies by 1 + weight, and before the cast; Llama by weight, and after it. Each is an argument.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from taut.nn.norm._arguments import check_choice, width
from taut.nn.norm._precision import wide


class RMSNorm(nn.Module):
    """y = x / RMS(x) * gain over the last axis, for x [..., d] of any floating dtype; statistics in float32.

    `gain`: "plain" multiplies by `weight`, "one_plus" by 1 + `weight`, "none" has no parameter (FlashNorm's weightless
    form). `order`: whether the normalised value is cast to x's dtype before the gain is multiplied in. `partial`: the
    share of leading features that the RMS is taken over (pRMSNorm: 0.0625); it divides all of them. `eps` None is the
    epsilon of the dtype of the statistics. `torch.nn.RMSNorm(d)`, whose arguments it takes, is this with
    order="gain_then_cast" and eps=None. Raises ValueError where `partial` leaves no feature, for a shape d of several
    axes, and for an x that has not d features.
    """

    weight: nn.Parameter | None

    def __init__(
        self,
        d: int | Sequence[int],
        eps: float | None = 1e-6,
        elementwise_affine: bool = True,
        *,
        eps_mode: Literal["inside", "outside"] = "inside",
        gain: Literal["plain", "one_plus", "none"] = "plain",
        order: Literal["cast_then_gain", "gain_then_cast"] = "cast_then_gain",
        partial: float = 1.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_choice("eps_mode", eps_mode, ("inside", "outside"))
        check_choice("gain", gain, ("plain", "one_plus", "none"))
        check_choice("order", order, ("cast_then_gain", "gain_then_cast"))
        d, gain = width(d), gain if elementwise_affine else "none"
        self.d, self.eps, self.eps_mode, self.gain, self.order = d, eps, eps_mode, gain, order
        self.measured = int(d * partial)
        if not 0 < self.measured <= d:
            raise ValueError(f"partial={partial} of {d} features is {self.measured}; it must leave 1 to {d} of them")
        start = torch.full((d,), 1.0 if gain == "plain" else 0.0, device=device, dtype=dtype)
        self.register_parameter("weight", nn.Parameter(start) if gain != "none" else None)

    def forward(self, x: Tensor) -> Tensor:
        if x.shape[-1] != self.d:
            raise ValueError(f"the norm is of {self.d} features, and x has {x.shape[-1]}")
        a = wide(x)
        eps = torch.finfo(a.dtype).eps if self.eps is None else self.eps
        mean_square = a[..., : self.measured].pow(2).mean(-1, keepdim=True)
        inside = self.eps_mode == "inside"
        y = a * torch.rsqrt(mean_square + eps) if inside else a / (mean_square.sqrt() + eps)
        if self.weight is None:
            return y.to(x.dtype)
        if self.order == "cast_then_gain":
            return (self._factor(self.weight) * y.to(x.dtype)).to(x.dtype)
        return (y * self._factor(wide(self.weight))).to(x.dtype)

    def _factor(self, weight: Tensor) -> Tensor:
        return weight if self.gain == "plain" else 1.0 + weight

    def extra_repr(self) -> str:
        return f"{self.d}, eps={self.eps} {self.eps_mode}, gain={self.gain}, {self.order}, measured={self.measured}"


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield RMSNorm(24), (make(2, 3, 24),)
    yield RMSNorm(24, 1e-8, eps_mode="outside", partial=0.25), (make(5, 24),)
    yield RMSNorm(24, gain="one_plus", order="gain_then_cast"), (make(2, 3, 24),)
    yield RMSNorm(24, gain="none"), (make(24),)
