import pytest
import torch
import torch.nn.functional as F

from taut.nn.mixer.async_softmax import (
    Window,
    async_attention,
    calibrate,
    flat_intensity,
    flat_parallelism,
)


def heads(queries: int = 5, keys: int = 37):
    torch.manual_seed(0)
    return torch.randn(2, 3, queries, 16).double(), *torch.randn(2, 2, 3, keys, 16).double()


@pytest.mark.parametrize("phi", [-20.0, 0.0, 6.5])
@pytest.mark.parametrize("splits", [1, 4, 37])
def test_is_softmax_attention_for_any_phi(phi, splits):
    q, k, v = heads()
    got, left = async_attention(q, k, v, Window(-20, 20, phi), splits=splits)
    assert not left.any()
    assert (got - F.scaled_dot_product_attention(q, k, v)).abs().max() <= 1e-12


def test_an_outlier_sends_its_row_and_no_other_to_ordinary_softmax():
    q, k, v = heads()
    q[0, 1, 2] *= 200
    got, left = async_attention(q, k, v, Window(-20, 20, 20))
    assert left.nonzero().tolist() == [[0, 1, 2]]
    assert (got - F.scaled_dot_product_attention(q, k, v)).abs().max() <= 1e-12


def test_masked_scores_do_not_count_as_outliers():
    q, k, v = heads()
    k[..., -1, :] *= 1000
    mask = torch.ones(5, 37, dtype=torch.bool)
    mask[:, -1] = False
    got, left = async_attention(q, k, v, Window(-20, 20, 20), mask=mask)
    assert not left.any()
    assert (got - F.scaled_dot_product_attention(q, k, v, attn_mask=mask)).abs().max() <= 1e-12


def test_overflow_and_nan_leave_the_window():
    q, k, v = (t.float() for t in heads())
    q[0, 0, 0] *= 1e30
    q[1, 1, 1] = torch.nan
    _, left = async_attention(q, k, v, Window(-20, 20, 20))
    assert left.nonzero().tolist() == [[0, 0, 0], [1, 1, 1]]


def test_calibration_holds_on_data_that_it_has_not_seen():
    torch.manual_seed(0)
    window = calibrate([torch.randn(300, 400) * 2 + 1 for _ in range(3)])
    fresh = torch.randn(1000, 1000) * 2 + 1
    assert ((fresh > window.low) & (fresh < window.high)).double().mean() >= 0.9999
    assert window.low < window.phi <= window.high
    assert window.high - window.low < 30


def test_calibration_refuses_scores_that_spread_too_far():
    with pytest.raises(ValueError, match="no one maximum"):
        calibrate([torch.linspace(-496.8, 363.5, 10_000)])


def test_a_wider_tile_trades_parallelism_for_intensity():
    assert flat_intensity(8, 4096, 256) > flat_intensity(8, 4096, 64)
    assert flat_parallelism(4096, 256) == 16 < flat_parallelism(4096, 64)
    assert flat_intensity(8, 4096, 4096) == pytest.approx(2 * 8 * 4096 * 4096 / (4096 * 4096 + 8 * 4096 + 8 * 4096))
