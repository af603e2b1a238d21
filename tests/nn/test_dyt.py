import torch

from taut.nn.norm.dyt import DyT


def test_is_a_scaled_tanh_of_every_element():
    torch.manual_seed(0)
    norm, x = DyT(24).double(), torch.randn(8, 24, dtype=torch.float64)
    with torch.no_grad():
        norm.alpha.fill_(0.7)
        norm.weight.normal_()
        norm.bias.normal_()
    torch.testing.assert_close(norm(x), norm.weight * torch.tanh(0.7 * x) + norm.bias, rtol=1e-14, atol=1e-14)


def test_gain_and_bias_fold_into_the_next_layer():
    torch.manual_seed(0)
    norm, x, weight = DyT(24).double(), torch.randn(8, 24).double(), torch.randn(16, 24).double()
    with torch.no_grad():
        norm.weight.normal_()
        norm.bias.normal_()
    folded = torch.tanh(norm.alpha * x) @ (weight * norm.weight).T + weight @ norm.bias
    torch.testing.assert_close(folded, norm(x) @ weight.T, rtol=1e-12, atol=1e-12)
