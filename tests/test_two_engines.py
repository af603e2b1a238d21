import pytest

from taut.two_engines import Latency, norm_latency, softmax_latency


def test_the_cycles_that_flash_norm_reports():
    found = norm_latency(512, 512, vector=128)
    assert (found.in_turn, found.interleaved, found.deferred) == (24, 21, 17)


@pytest.mark.parametrize(("n", "percent"), [(512, 29.2), (576, 27.4), (2048, 10.8), (4096, 5.8)])
def test_what_deferring_saves_falls_with_the_width(n: int, percent: float):
    assert 100 * norm_latency(n, n, vector=128).saved == pytest.approx(percent, abs=0.05)


@pytest.mark.parametrize("k", [1, 64, 128, 4096])
def test_a_reduction_is_hidden_by_a_product_that_takes_as_long(k: int):
    found = norm_latency(512, k, vector=128)
    assert (found.exposed == 0) == (found.product >= found.reduction) == (k >= 128)
    assert found.deferred == found.product + found.exposed + 1


def test_the_share_of_collective_operations():
    found = norm_latency(512, 512, vector=128)
    assert found.collective_share == pytest.approx(4 / 24)
    assert found.saved == pytest.approx(1 - 17 / 24)
    assert Latency(0, 4, 16).collective_share == 0


def test_a_softmax_over_few_features_exposes_its_sum():
    """64 value features leave half of the sum over the keys uncovered, however many these are; 128 cover it."""
    for keys in (128, 4096):
        assert softmax_latency(keys, 64, vector=128).exposed == keys / 128 / 2
        assert softmax_latency(keys, 128, vector=128).exposed == 0
