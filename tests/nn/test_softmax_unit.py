import math

import pytest
import torch

from taut.nn.emulate.softmax import softmax_codes, softmax_q, study

from .char_lm import held_out_loss, with_softmax


def divergence(q: torch.Tensor, p: torch.Tensor) -> torch.Tensor:
    """KL(q || p) of each row, in nats."""
    return (torch.special.xlogy(q, q) - torch.special.xlogy(q, p)).sum(-1)


@pytest.mark.parametrize("bits", [8, 16])
def test_a_million_rows_sum_to_one_exactly(bits):
    torch.manual_seed(0)
    for _ in range(10):
        x = torch.randn(100_000, 12) * torch.exp(torch.randn(100_000, 1))
        codes = softmax_codes(x, bits)
        assert (codes.sum(-1) == 2**bits).all()
        assert (codes >= 0).all()


def test_without_the_guarantee_the_sum_drifts():
    torch.manual_seed(0)
    x = torch.randn(2000, 64)
    assert study(x, guarantee=False).guarantee_error > 0.01
    assert study(x).guarantee_error == 0


@pytest.mark.parametrize("n", [8, 32, 128])
def test_is_close_to_softmax(n):
    torch.manual_seed(0)
    x = torch.randn(2000, n).double() * 3
    assert divergence(softmax_q(x), x.softmax(-1)).max() <= 1e-3


def test_eight_bit_probabilities_cannot_be_that_close():
    """Even the best 8-bit probabilities for 128 even scores miss softmax by more than 1e-3 nats."""
    torch.manual_seed(0)
    p = torch.randn(500, 128).double().softmax(-1)
    floors = (p * 256).floor()
    order = (p * 256 - floors).argsort(-1, descending=True).argsort(-1)
    best = (floors + (order < 256 - floors.sum(-1, keepdim=True))) / 256
    assert (best.sum(-1) == 1).all()
    assert divergence(best, p).min() > 1e-3


def test_masked_scores_get_nothing():
    codes = softmax_codes(torch.tensor([[1.0, -torch.inf, 0.5, -torch.inf]]))
    assert codes[0, 1] == codes[0, 3] == 0
    assert codes.sum() == 2**16


@pytest.mark.parametrize("wrong", [torch.nan, torch.inf])
def test_what_no_integer_holds_gives_nan(wrong):
    y = softmax_q(torch.tensor([[1.0, wrong, 0.5], [1.0, 2.0, -torch.inf]]))
    assert y[0].isnan().all()
    assert y[1].sum() == 1


@pytest.mark.slow
def test_a_language_model_hardly_notices(layer_norm_lm):
    exact = math.exp(held_out_loss(layer_norm_lm))
    assert math.exp(held_out_loss(with_softmax(layer_norm_lm, softmax_q))) == pytest.approx(exact, rel=5e-3)
