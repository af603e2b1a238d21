import torch
import torch.nn.functional as F

from taut.ops.layer_norm import layer_norm


def test_equals_torch_in_float64():
    x, gain, bias = torch.randn(3, 5, 48).double() + 2, torch.randn(48).double(), torch.randn(48).double()
    expected = F.layer_norm(x, (48,), gain, bias, 1e-3)
    torch.testing.assert_close(layer_norm(x, gain, bias, 1e-3), expected, rtol=1e-14, atol=1e-14)


def test_a_large_mean_costs_no_more_accuracy_than_torch_does():
    x = torch.randn(16, 1024) + 1000
    truth = F.layer_norm(x.double(), (1024,))
    error = lambda y: (y.double() - truth).norm() / truth.norm()  # noqa: E731
    assert error(layer_norm(x)) <= 2 * error(F.layer_norm(x, (1024,))) + torch.finfo(torch.float32).eps
