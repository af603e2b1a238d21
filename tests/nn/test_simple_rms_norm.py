import torch
import torch.nn.functional as F

from taut.nn.norm.rms_norm import RMSNorm
from taut.nn.norm.simple_rms_norm import SimpleRMSNorm


def test_is_rms_norm_with_a_gain_of_one():
    x = torch.randn(8, 64, dtype=torch.float64)
    assert torch.equal(SimpleRMSNorm(64)(x), RMSNorm(64).double()(x))
    assert not list(SimpleRMSNorm(64).parameters())


def test_scales_to_length_root_d():
    x = torch.randn(8, 64, dtype=torch.float64)
    torch.testing.assert_close(SimpleRMSNorm(64, 0.0)(x), 8 * F.normalize(x, dim=-1), rtol=1e-14, atol=1e-14)


def test_gated_product_defers_the_scalar_squared():
    torch.manual_seed(0)
    x, gate, up = torch.randn(8, 64).double(), torch.randn(64, 96).double(), torch.randn(64, 96).double()
    down = torch.randn(96, 64).double()
    y = SimpleRMSNorm(64)(x)
    squared = 1 / (x.pow(2).mean(-1, keepdim=True) + 1e-6)
    want = ((y @ gate) * (y @ up)) @ down
    assert (((x @ gate) * (x @ up)) @ down * squared - want).abs().max() <= 1e-12 * want.abs().max()
