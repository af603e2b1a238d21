import torch
import torch.nn.functional as F

from taut.ops.rms_norm import rms_norm


def test_equals_torch_in_float64():
    x, gain = torch.randn(3, 5, 48).double(), torch.randn(48).double()
    torch.testing.assert_close(rms_norm(x, gain, 1e-3), F.rms_norm(x, (48,), gain, 1e-3), rtol=1e-14, atol=1e-14)


def test_an_epsilon_per_token_keeps_a_cancelled_norm_exact():
    a, b = torch.randn(7, 32).double(), torch.randn(7, 16).double()
    e1, e2 = 1e-2, 3e-2
    twice = rms_norm(b * torch.rsqrt(a.square().mean(-1, keepdim=True) + e1), eps=e2)
    once = rms_norm(b, eps=e2 * (e1 + a.square().mean(-1, keepdim=True)))
    torch.testing.assert_close(once, twice, rtol=1e-13, atol=1e-13)


def test_the_gain_multiplies_before_the_only_rounding():
    x, gain = torch.randn(64, 96).bfloat16(), torch.rand(96) + 0.5
    exact = F.rms_norm(x.double(), (96,), gain.double(), 1e-6)
    assert torch.equal(rms_norm.reference(x, gain), exact.float().bfloat16())


def test_half_precision_does_not_overflow():
    x = torch.full((2, 64), 3e4).half()
    torch.testing.assert_close(rms_norm(x), torch.ones(2, 64).half())
