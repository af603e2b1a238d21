import torch
import torch.nn.functional as F

from taut.ops.add_rms_norm import add_rms_norm


def test_equals_torch_in_float64():
    x, residual, gain = torch.randn(3, 48).double(), torch.randn(3, 48).double(), torch.randn(48).double()
    y, total = add_rms_norm(x, residual, gain, 1e-3)
    assert torch.equal(total, x + residual)
    torch.testing.assert_close(y, F.rms_norm(x + residual, (48,), gain, 1e-3), rtol=1e-14, atol=1e-14)


def test_hands_on_the_sum_that_it_normalised():
    x, residual = torch.randn(4, 96).bfloat16(), torch.randn(4, 96).bfloat16()
    for impl in ("reference", "numba"):
        _, total = add_rms_norm(x, residual, impl=impl)
        assert torch.equal(total, x + residual)
