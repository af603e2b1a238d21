import pytest
import torch

from taut.nn.ffn.bit_linear import BitLinear, ternary_codes, token_codes


def test_forward_is_the_integer_product_with_scales():
    torch.manual_seed(0)
    layer, x = BitLinear(96, 40), torch.randn(7, 5, 96) * 3
    codes, scale = token_codes(layer.norm(x))
    ternary, gamma = ternary_codes(layer.weight)
    integers = codes.long() @ ternary.long().T
    assert torch.equal(layer(x), integers.float() * (scale * gamma))
    assert (codes == codes.round()).all()
    assert codes.abs().max() == 127
    assert set(ternary.unique().tolist()) == {-1, 0, 1}


def test_the_largest_sums_are_still_exact():
    codes, ternary = torch.full((1, 131072), -128.0), torch.ones(3, 131072)
    ternary[:, 0] = 0
    assert torch.equal((codes @ ternary.T).long(), codes.long() @ ternary.long().T)
    with pytest.raises(ValueError, match="split the layer"):
        BitLinear(131073, 1)


def test_gradient_is_that_of_a_linear_layer_on_the_rounded_operands():
    torch.manual_seed(0)
    layer, x = BitLinear(24, 16).double(), torch.randn(2, 5, 24, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(2, 5, 16).double()
    layer(x).backward(upstream)
    normed = layer.norm(x)
    codes, scale = token_codes(normed)
    ternary, gamma = ternary_codes(layer.weight)
    rounded = normed + (codes * scale - normed).detach()
    weight = layer.weight + (ternary * gamma - layer.weight).detach()
    wanted = torch.autograd.grad(rounded @ weight.T, (x, layer.weight), upstream)
    torch.testing.assert_close(x.grad, wanted[0], rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(layer.weight.grad, wanted[1], rtol=1e-12, atol=1e-12)


def test_a_silent_token_gives_zeros():
    assert not BitLinear(24, 16)(torch.zeros(2, 24)).any()
