import torch

from taut.ops.linear_residual import linear_residual
from taut.ops.rms_norm import rms_norm


def test_the_next_norm_needs_only_the_sum_that_was_handed_on():
    x, weight, residual = torch.randn(3, 20), torch.randn(48, 20), torch.randn(3, 48)
    for impl in ("reference", "numba"):
        for dtype in (torch.float32, torch.bfloat16):
            y, squares = linear_residual(x.to(dtype), weight.to(dtype), residual.to(dtype), impl=impl)
            assert squares.dtype == torch.float32
            normed = y.float() * torch.rsqrt(squares / 48 + 1e-6)
            torch.testing.assert_close(normed, rms_norm(y.float()))


def test_equals_torch_in_float64():
    x, weight, residual, bias = (torch.randn(*s).double() for s in ((3, 20), (7, 20), (3, 7), (7,)))
    y, squares = linear_residual(x, weight, residual, bias)
    torch.testing.assert_close(y, torch.addmm(residual, x, weight.T) + bias, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(squares, y.norm(dim=-1, keepdim=True) ** 2, rtol=1e-13, atol=1e-13)
