"""Runs in a process of its own with Triton's interpreter switched on, or, with the name of a device, compiled there.

Prints a line `name error plain_error share_of_codes_that_differ most_steps_between_them` for every case. The
interpreter loses the carry where rounding to float8 reaches the next power of two: 8 steps too low.
"""

from __future__ import annotations

import sys

import torch
from torch import Tensor

from taut.formats.microscaling import MXFP8, Blocks
from taut.nn.norm.mx import gaussian_constant
from taut.ops._triton import quantized
from taut.ops.mx_norm import mx_norm
from taut.ops.norm_fp8 import norm_fp8


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


def report(name: str, values: tuple[Tensor, ...], truth: Tensor) -> None:
    got, plain, codes, expected = values
    error = lambda t: float((t.double() - truth).norm() / truth.norm())  # noqa: E731
    apart = (codes.int() - expected.int()).abs()
    print(name, error(got), error(plain), float((apart > 0).double().mean()), int(apart.max()))


def main() -> None:
    torch.manual_seed(0)
    c = gaussian_constant(2, 32)
    for tokens, d in ((5, 32), (7, 96), (300, 160)):
        x = inputs(tokens, d)
        wide = x.double()
        maxima = wide.unflatten(-1, (-1, 32)).abs().amax(-1).square().mean(-1, keepdim=True)
        for exact in (False, True):
            scales, codes = quantized.mx_norm(x, c, 1e-6, exact)
            assert torch.equal(scales, mx_norm.reference(x, c, 1e-6, exact)[0])
            rms = (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt() if exact else c * (maxima + 1e-6).sqrt()
            expected = mx_norm.reference(x, c, 1e-6, exact)
            got, plain = (MXFP8.dequantize(Blocks(*pair)) for pair in ((scales, codes), expected))
            report(f"mx_norm {tokens}x{d} {exact}", (got, plain, codes, expected[1]), wide / rms)
        codes, scale = quantized.norm_fp8(x, 1e-6)
        expected = norm_fp8.reference(x)
        values = [b.view(torch.float8_e4m3fn).float() * s[:, None] for b, s in ((codes, scale), expected)]
        truth = wide / (wide.square().mean(-1, keepdim=True) + 1e-6).sqrt()
        report(f"norm_fp8 {tokens}x{d}", (*values, codes, expected[0]), truth)
    x = inputs(4, 64)
    x[1, 5], x[2, 40] = float("nan"), float("inf")
    scales, codes = quantized.mx_norm(x, c, 1e-6, False)
    expected = mx_norm.reference(x, c)
    assert torch.equal(scales, expected[0]), (scales, expected[0])
    assert sys.argv[1] == "cpu" or torch.equal(codes, expected[1])


if __name__ == "__main__":
    main()
