"""Norms in many spellings, and things that are nearly norms."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Rms(nn.Module):
    """RMSNorm by hand; `spelling` is how."""

    def __init__(self, size: int, eps: float, spelling: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size) if spelling == "1+w" else torch.ones(size))
        self.eps, self.spelling = eps, spelling

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.spelling != "own dtype" else x
        if self.spelling == "divides":
            normed = wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()
        elif self.spelling == "product":
            normed = torch.reciprocal(torch.sqrt(self.eps + (wide * wide).mean(dim=-1, keepdim=True))) * wide
        else:
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        gain = {"1+w": 1.0 + self.gain.float(), "half": 0.5 * self.gain}.get(self.spelling, self.gain)
        return (gain * normed).to(x.dtype)


class Layer(nn.Module):
    """LayerNorm by hand; the variance over the wrong axis, or of another degree of freedom, is no LayerNorm."""

    def __init__(self, size: int, eps: float, spelling: str) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps, self.spelling = eps, spelling

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        if self.spelling == "unbiased":
            spread = x.var(-1, keepdim=True) if x.shape[-1] > 1 else torch.ones_like(x)
        elif self.spelling == "over tokens":
            spread = centred.pow(2).mean(0, keepdim=True)
        elif self.spelling == "var":
            spread = x.var(-1, keepdim=True, unbiased=False)
        else:
            spread = centred.pow(2).mean(-1, keepdim=True)
        return centred * torch.rsqrt(spread + self.eps) * self.gain + self.bias


class Dyt(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.gain, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.gain + self.bias


class Tied(nn.Module):
    """A LayerNorm whose bias is its gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain, self.gain, self.eps)


class Odd(nn.Module):
    """Gains that are no affine function of a parameter, or of one parameter."""

    def __init__(self, size: int, eps: float, kind: str) -> None:
        super().__init__()
        self.gain, self.eps, self.kind = nn.Parameter(torch.ones(size)), eps, kind
        self.second = nn.Parameter(torch.ones(size))
        self.register_buffer("mask", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        gain = {
            "rounded": lambda: (4 * self.gain).round() / 4,
            "whole": lambda: self.gain.to(torch.int32).to(x.dtype),
            "clamped": lambda: self.gain.clamp(-0.8, 1.2),
            "flipped": lambda: self.gain.flip(0),
            "two": lambda: self.gain * self.second,
            "buffer": lambda: self.gain + self.mask,
            "input": lambda: self.gain + x[0, 0].mean(),
            "one": lambda: self.gain[:1].expand(x.shape[-1]),
            "row": lambda: self.gain[None, None],
        }[self.kind]()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": lambda n, eps: nn.RMSNorm(n, eps=eps),
    "layer": lambda n, eps: nn.LayerNorm(n, eps=eps),
    "layer without bias": lambda n, eps: nn.LayerNorm(n, eps=eps, bias=False),
    "rms without gain": lambda n, eps: nn.RMSNorm(n, eps=eps, elementwise_affine=False),
    "layer without gain": lambda n, eps: nn.LayerNorm(n, eps=eps, elementwise_affine=False),
    "dyt": Dyt,
    "tied": Tied,
    **{f"rms {s}": lambda n, eps, s=s: Rms(n, eps, s) for s in ("1+w", "half", "divides", "product", "own dtype")},
    **{f"layer {s}": lambda n, eps, s=s: Layer(n, eps, s) for s in ("plain", "var", "unbiased", "over tokens")},
    **{
        f"odd {k}": lambda n, eps, k=k: Odd(n, eps, k)
        for k in ("rounded", "whole", "clamped", "flipped", "two", "buffer", "input", "one", "row")
    },
}
USUAL = (
    *("rms", "rms 1+w", "rms divides", "rms product"),
    *("layer", "layer without bias", "layer plain", "layer var", "dyt"),
)
