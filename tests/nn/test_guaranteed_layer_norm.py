import math

import pytest
import torch
import torch.nn.functional as F

from taut.nn.norm.guaranteed_layer_norm import GuaranteedLayerNorm, cycles, layer_norm_codes, study

from .char_lm import held_out_loss, with_norms


def rows(d: int) -> torch.Tensor:
    """Rows of very different size, some with a mean far from zero."""
    torch.manual_seed(0)
    return torch.randn(400, d) * torch.exp(2 * torch.randn(400, 1)) + torch.randn(400, 1)


@pytest.mark.parametrize("d", [32, 768, 4096])
@pytest.mark.parametrize("fraction_bits", [4, 8, 12, 14])
def test_deviation_is_one_to_the_last_bit(d, fraction_bits):
    codes = layer_norm_codes(rows(d), fraction_bits).double() * 2.0**-fraction_bits
    assert (codes.std(-1, correction=0) - 1).abs().max() <= 2.0**-fraction_bits


def test_without_the_correction_the_deviation_drifts():
    assert study(rows(768), 12, guarantee=False).guarantee_error > 4 * 2.0**-12
    assert study(rows(768), 12).guarantee_error <= 2.0**-12


def test_a_rougher_root_still_gives_deviation_one():
    assert study(rows(768), 8, steps=1).guarantee_error <= 2 * 2.0**-8
    assert study(rows(768), 8, steps=1, guarantee=False).guarantee_error > 8 * 2.0**-8


def test_is_layer_norm_up_to_its_bits():
    torch.manual_seed(0)
    x = torch.randn(500, 256)
    error = (layer_norm_codes(x, 12) * 2.0**-12 - F.layer_norm(x, (256,), eps=0.0)).abs().max()
    assert error <= 2.0**-12
    assert study(x, 12).cycles == cycles(256) == 257


def test_a_constant_row_gives_zeros_and_size_does_not_matter():
    assert not layer_norm_codes(torch.full((1, 64), 3.0)).any()
    x = torch.randn(10, 64)
    assert torch.equal(layer_norm_codes(x * 2.0**60), layer_norm_codes(x * 2.0**-60))


@pytest.mark.parametrize(("d", "bits"), [(16384, 8), (64, 20)])
def test_refuses_what_would_overflow(d, bits):
    with pytest.raises(ValueError, match="at most 8192"):
        layer_norm_codes(torch.ones(d), bits)


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_no_integer_holds_gives_nan(wrong):
    x = torch.randn(2, 64)
    norm = GuaranteedLayerNorm((64,))
    want = norm(x)
    x[0, 5] = wrong
    assert norm(x)[0].isnan().all()
    assert torch.equal(norm(x)[1], want[1])


@pytest.mark.slow
def test_a_language_model_hardly_notices(layer_norm_lm):
    def replaced(norm):
        swapped = GuaranteedLayerNorm(norm.normalized_shape[0])
        swapped.load_state_dict(norm.state_dict())
        return swapped

    exact = math.exp(held_out_loss(layer_norm_lm))
    assert math.exp(held_out_loss(with_norms(layer_norm_lm, replaced))) == pytest.approx(exact, rel=5e-3)
