import math

import pytest
import torch
import torch.nn.functional as F

from taut.nn.norm.iter_l2_norm import IterL2Norm, cycles, iter_rsqrt, study

from .char_lm import held_out_loss, with_norms


def worst(steps: int, scheme: str, dtype=torch.float64) -> float:
    m = torch.logspace(-4, 6, 20001, dtype=torch.float64).to(dtype)
    return (iter_rsqrt(m, steps, scheme).double() * m.double().sqrt() - 1).abs().max().item()


@pytest.mark.parametrize(
    ("scheme", "steps", "error"),
    [("flow", 5, 2.7e-2), ("flow", 10, 8.5e-4), ("newton", 3, 2.5e-2), ("newton", 5, 1.2e-6)],
)
def test_converges_as_stated(scheme, steps, error):
    assert worst(steps, scheme) == pytest.approx(error, rel=0.05)


def test_newton_reaches_rounding():
    assert worst(7, "newton") <= 5e-16
    assert worst(7, "newton", torch.bfloat16) <= 2**-6


def test_the_bit_trick_with_one_step():
    assert worst(1, "fast_inverse", torch.float32) == pytest.approx(1.75e-3, rel=0.01)
    with pytest.raises(TypeError, match="bits of a float32"):
        iter_rsqrt(torch.ones(1).double(), 1, "fast_inverse")


def test_six_newton_steps_normalise_as_well_as_torch_does():
    torch.manual_seed(0)
    x = torch.randn(500, 768) * torch.logspace(-2, 3, 500)[:, None]
    truth = F.layer_norm(x.double(), (768,))
    ours = (IterL2Norm(768, steps=6)(x).double() - truth).abs().max()
    theirs = (F.layer_norm(x, (768,)).double() - truth).abs().max()
    assert ours <= 2 * theirs + torch.finfo(torch.float32).eps * truth.abs().max()


def test_cycles_are_the_published_ones():
    assert (cycles(64), cycles(1024)) == (116, 227)
    assert cycles(65) - cycles(64) == pytest.approx(0.116, rel=0.01)


def test_the_report_shows_what_steps_and_bits_buy():
    torch.manual_seed(0)
    x = torch.randn(200, 256)
    few, many, narrow = study(x, 3), study(x, 6), study(x, 6, dtype=torch.bfloat16)
    assert few.rms_error > 100 * many.rms_error
    assert 1e-4 < narrow.guarantee_error < 2e-2
    assert many.operations["multiply"] - few.operations["multiply"] == 3 * 4
    assert many.cycles == round(cycles(256))


def test_refuses_an_unknown_scheme():
    with pytest.raises(ValueError, match="newton, flow or fast_inverse"):
        iter_rsqrt(torch.ones(1), 3, "halley")


@pytest.mark.slow
def test_a_language_model_needs_five_steps(layer_norm_lm):
    def perplexity(steps: int) -> float:
        def replaced(norm):
            swapped = IterL2Norm(norm.normalized_shape[0], norm.eps, steps=steps)
            swapped.load_state_dict(norm.state_dict())
            return swapped

        return math.exp(held_out_loss(with_norms(layer_norm_lm, replaced)))

    exact = math.exp(held_out_loss(layer_norm_lm))
    assert perplexity(5) == pytest.approx(exact, rel=1e-3)
    assert perplexity(2) != pytest.approx(exact, rel=1e-3)
