"""Runs in a process of its own with Triton's interpreter switched on, or, with the name of a device, compiled there.

Prints a line `name error plain_error` for every case. The error of codes is the least that their quotients must have,
and plain code's that of its own quotients, before it rounds. The interpreter loses the carry where rounding to float8
reaches the next power of two, which is 8 steps too low, and truncates below the least normal number; that is put right
here, and nothing else.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor

from taut.formats.minifloat import E4M3
from taut.nn.norm.mx import gaussian_constant
from taut.ops._triton import quantized
from taut.ops.mx_norm import mx_norm
from taut.ops.norm_fp8 import norm_fp8

sys.path.insert(0, str(Path(__file__).parent.parent))

from twice import error, surplus, worst


def with_gaps(t: Tensor) -> Tensor:
    """The same values in rows that stand apart, with NaN between."""
    room = torch.full((len(t), t.shape[1] + 8), float("nan"), dtype=t.dtype, device=t.device)
    room[:, : t.shape[1]] = t
    return room[:, : t.shape[1]]


def inputs(tokens: int, d: int) -> Tensor:
    """Rows of very different size, some with features far larger than the others, and one of zeros."""
    x = torch.randn(tokens, d) * torch.exp2(torch.randint(-12, 8, (tokens, 1)).float())
    x[:, 3] *= 30
    x[0] = 0
    return with_gaps(x.half().float() if sys.argv[1] == "cpu" else x.bfloat16()).to(sys.argv[1])


def mean_root(x: Tensor, c: float, exact: bool) -> Tensor:
    """What a row is divided by, from its values or from the maxima of its blocks."""
    values = x if exact else x.unflatten(-1, (-1, 32)).abs().amax(-1)
    return (1 if exact else c) * (values.square().mean(-1, keepdim=True) + 1e-6).sqrt()


def mended(codes: Tensor, nearest: Tensor) -> Tensor:
    """Codes as they would be without the interpreter's two faults; on a GPU, as they are."""
    if sys.argv[1] != "cpu":
        return codes
    below, size = nearest.int() - codes.int(), nearest & 127
    carry, subnormal = (below == 8) & (size % 8 == 0), (below > 0) & (below < 8) & (size <= 8)
    return torch.where(carry | subnormal, nearest, codes)


def report(name: str, codes: Tensor, quotients: Tensor, plain: Tensor) -> None:
    rounded = E4M3.round(quotients)
    codes = mended(codes, E4M3.encode(rounded))
    print(name, surplus(E4M3.decode(codes, torch.float64), rounded, quotients), worst(plain, quotients))


def main() -> None:
    torch.manual_seed(0)
    c = gaussian_constant(2, 32)
    for tokens, d in ((5, 32), (7, 96), (300, 160)):
        x = inputs(tokens, d)
        wide = x.double()
        for exact in (False, True):
            scales, codes = quantized.mx_norm(x, c, 1e-6, exact)
            assert torch.equal(scales, mx_norm.reference(x, c, 1e-6, exact)[0])
            powers = torch.exp2(scales.double() - 127).repeat_interleave(32, -1)
            plain = x.float() / mean_root(x.float(), c, exact) / powers.float()
            report(f"mx_norm {tokens}x{d} {exact}", codes, wide / mean_root(wide, c, exact) / powers, plain)
        codes, scale = quantized.norm_fp8(x, 1e-6)
        expected = norm_fp8.reference(x)
        top = wide.abs().amax(-1, keepdim=True).clamp_min(1e-30)
        report(f"norm_fp8 codes {tokens}x{d}", codes, wide / top * 448, x.float() / top.float() * 448)
        truth = (top / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() / 448)[:, 0]
        print(f"norm_fp8 scale {tokens}x{d}", error(scale, truth), error(expected[1], truth))
    x = inputs(4, 64)
    x[1, 5], x[2, 40] = float("nan"), float("inf")
    scales, codes = quantized.mx_norm(x, c, 1e-6, False)
    expected = mx_norm.reference(x, c)
    assert torch.equal(scales, expected[0]), (scales, expected[0])
    assert sys.argv[1] == "cpu" or torch.equal(codes, expected[1])


if __name__ == "__main__":
    main()
