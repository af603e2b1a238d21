import torch
import torch.nn.functional as F

from taut.ops.norm_linear import norm_linear


def test_equals_norm_then_linear_in_float64():
    x, weight, gain, bias = (torch.randn(*s).double() for s in ((2, 3, 20), (7, 20), (20,), (7,)))
    residual = torch.randn(2, 3, 7).double()
    expected = F.linear(F.rms_norm(x, (20,), gain, 1e-3), weight, bias) + residual
    torch.testing.assert_close(norm_linear(x, weight, gain, bias, 1e-3, residual), expected, rtol=1e-13, atol=1e-13)


def test_one_rounding_is_more_accurate_than_two():
    x, weight = torch.randn(8, 256).bfloat16(), torch.randn(300, 256).bfloat16()
    truth = F.linear(F.rms_norm(x.double(), (256,), eps=1e-6), weight.double())
    error = lambda y: (y.double() - truth).norm()  # noqa: E731
    unfused = error(F.linear(F.rms_norm(x, (256,), eps=1e-6), weight))
    for impl in ("reference", "numba"):
        assert error(norm_linear(x, weight, impl=impl)) < 0.9 * unfused
