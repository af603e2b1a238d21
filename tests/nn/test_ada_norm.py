import torch

from taut.nn.norm.ada_norm import AdaNorm


def standardised(x, eps=1e-5):
    return (x - x.mean(-1, keepdim=True)) / (x.std(-1, keepdim=True) + eps)


def test_forward_is_the_formula_with_the_unbiased_deviation():
    x = torch.randn(100, 24, dtype=torch.float64)
    y = standardised(x)
    torch.testing.assert_close(AdaNorm(24, C=2.0)(x), 2.0 * y * (1 - 0.1 * y), rtol=1e-12, atol=1e-12)
    biased = (x - x.mean(-1, keepdim=True)) / (x.std(-1, correction=0, keepdim=True) + 1e-5)
    torch.testing.assert_close(AdaNorm(24, unbiased=False)(x), biased * (1 - 0.1 * biased), rtol=1e-12, atol=1e-12)


def test_backward_treats_the_factor_as_a_constant():
    x = torch.randn(100, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(100, 24, dtype=torch.float64)
    factor = (1 - 0.1 * standardised(x)).detach()
    (want,) = torch.autograd.grad(factor * standardised(x), x, upstream)
    (got,) = torch.autograd.grad(AdaNorm(24)(x), x, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)
    through = standardised(x) * (1 - 0.1 * standardised(x))
    (other,) = torch.autograd.grad(through, x, upstream)
    assert not torch.allclose(got, other)
