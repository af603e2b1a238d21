import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.parametrize import remove_parametrizations

from taut.nn.norm.centered_output import center_output

LAYERS = [
    (nn.Linear(12, 16), torch.randn(5, 12), -1),
    (nn.Conv1d(4, 16, 3), torch.randn(2, 4, 9), 1),
    (nn.Conv2d(4, 16, 3, groups=2), torch.randn(2, 4, 9, 9), 1),
    (nn.Embedding(20, 16), torch.arange(20), -1),
]


@pytest.mark.parametrize(("layer", "x", "features"), LAYERS, ids=lambda v: type(v).__name__)
def test_output_has_zero_mean_over_its_features(layer, x, features):
    layer = center_output(layer.double())
    x = x.double() if x.is_floating_point() else x
    assert layer(x).mean(features).abs().max() < 1e-15
    assert layer(x).abs().max() > 0.1


def test_layer_norm_behind_it_is_an_rms_norm_even_when_written_down():
    torch.manual_seed(0)
    layer, x = center_output(nn.Linear(12, 16).double()), torch.randn(5, 12).double()
    remove_parametrizations(layer, "weight")
    remove_parametrizations(layer, "bias")
    torch.testing.assert_close(
        F.rms_norm(layer(x), (16,), eps=1e-5), F.layer_norm(layer(x), (16,)), rtol=1e-12, atol=1e-12
    )


def test_gradient_is_the_projected_one():
    torch.manual_seed(0)
    x, upstream = torch.randn(5, 12).double(), torch.randn(5, 16).double()
    plain, centred = nn.Linear(12, 16).double(), nn.Linear(12, 16).double()
    centred.load_state_dict(plain.state_dict())
    center_output(centred)
    plain(x).backward(upstream)
    centred(x).backward(upstream)
    projection = torch.eye(16).double() - 1 / 16
    got = centred.parametrizations.weight.original.grad
    torch.testing.assert_close(got, projection @ plain.weight.grad, rtol=1e-10, atol=1e-10)
    got = centred.parametrizations.bias.original.grad
    torch.testing.assert_close(got, projection @ plain.bias.grad, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    ("layer", "reason"), [(nn.ConvTranspose1d(4, 8, 3), "ConvTranspose1d"), (nn.Conv1d(8, 8, 3, groups=8), "depthwise")]
)
def test_refuses_what_it_cannot_centre(layer, reason):
    with pytest.raises(ValueError, match=reason):
        center_output(layer)
