import torch
import torch.nn.functional as F

from taut.nn.norm.qk_norm import QKNorm


def test_scores_are_bounded_by_the_gains_alone():
    torch.manual_seed(0)
    norm = QKNorm(16)
    q, k = norm(torch.randn(2, 4, 9, 16) * 1000, torch.randn(2, 4, 9, 16) * 1000)
    assert (q @ k.transpose(-1, -2) / 16**0.5).abs().max() <= 16**0.5 * (1 + 1e-5)


def test_is_torch_rms_norm_on_either_side():
    torch.manual_seed(0)
    norm, q, k = QKNorm(16).double(), torch.randn(2, 4, 9, 16).double(), torch.randn(2, 2, 9, 16).double()
    with torch.no_grad():
        norm.q_norm.weight.normal_()
        norm.k_norm.weight.normal_()
    for got, x, part in zip(norm(q, k), (q, k), (norm.q_norm, norm.k_norm), strict=True):
        torch.testing.assert_close(got, F.rms_norm(x, (16,), part.weight, 1e-6), rtol=1e-13, atol=1e-13)
