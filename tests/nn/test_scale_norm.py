import torch
import torch.nn.functional as F

from taut.nn.norm.scale_norm import ScaleNorm


def test_every_token_gets_the_same_length():
    x = torch.randn(8, 24, dtype=torch.float64)
    norm = ScaleNorm(24).double()
    torch.testing.assert_close(norm(x), norm.weight * F.normalize(x, dim=-1), rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(norm(x).norm(dim=-1), torch.full((8,), norm.weight.item(), dtype=torch.float64))
    assert abs(norm.weight.item() - 24**0.5) < 1e-6
