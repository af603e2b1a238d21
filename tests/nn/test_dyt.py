import torch
from torch import nn

import taut
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
    model = nn.Sequential(DyT(24), nn.Linear(24, 16)).double()
    with torch.no_grad():
        model[0].weight.normal_()
        model[0].bias.normal_()
    x = torch.randn(8, 24).double()
    folded = taut.apply(model, example={"input": x})
    assert torch.equal(folded[0].weight, torch.ones(24).double())
    assert not folded[0].bias.any()
    torch.testing.assert_close(folded(x), model(x), rtol=1e-12, atol=1e-12)
