import math

import pytest
import torch
import torch.nn.functional as F

from taut.nn.norm.light_norm import LightNorm2d, RangeBatchNorm2d, expected_range, study


@pytest.mark.parametrize(("n", "ratio"), [(32, 0.79), (512, 0.86), (4096, 0.89), (65536, 0.91)])
def test_expected_range_of_normal_numbers(n, ratio):
    assert expected_range(n).item() / (2 * math.sqrt(2 * math.log(n))) == pytest.approx(ratio, rel=0.01)


@pytest.mark.parametrize(("n", "want"), [(2, 2 / math.sqrt(math.pi)), (3, 3 / math.sqrt(math.pi))])
def test_expected_range_in_closed_form(n, want):
    assert expected_range(n).item() == pytest.approx(want, rel=1e-12)


def test_noise_of_the_range_is_as_stated():
    torch.manual_seed(0)
    for n, spread in ((32, 0.17), (65536, 0.046)):
        x = torch.randn(1000, n)
        ranges = x.amax(-1) - x.amin(-1)
        assert (ranges.std() / ranges.mean()).item() == pytest.approx(spread, rel=0.1)


def test_is_a_batch_norm_on_normal_inputs():
    torch.manual_seed(0)
    x = torch.randn(32, 8, 16, 16) * torch.rand(8, 1, 1) + torch.randn(8, 1, 1)
    norm = RangeBatchNorm2d(8)
    got, want = norm(x), F.batch_norm(x, None, None, training=True)
    assert (got - want).norm() / want.norm() < 0.05
    norm.momentum = 1.0
    norm(x)
    assert (norm.eval()(x) - got).abs().max() < 1e-5


def test_a_chunked_range_shrugs_at_one_outlier():
    torch.manual_seed(0)
    x = torch.randn(32, 1, 16, 16)
    spoilt = x.clone()
    spoilt[0, 0, 0, 0] = 100.0
    change = [
        (n(spoilt) / n(x)).median().item() for n in (RangeBatchNorm2d(1, chunks=16), RangeBatchNorm2d(1, chunks=1))
    ]
    assert change[0] > 0.4 > 0.1 > change[1]


def test_light_norm_is_close_and_moves_a_third_of_the_bits():
    torch.manual_seed(0)
    x = torch.randn(8, 16, 8, 8)
    light, exact = LightNorm2d(16), RangeBatchNorm2d(16)
    assert 0 < (light(x) - exact(x)).norm() / exact(x).norm() < 0.03
    assert light.bits_moved < 96 / 3


def test_the_report_shows_the_noise_of_the_range():
    torch.manual_seed(0)
    x = torch.randn(32, 8, 16, 16)
    exact_width, light = study(x, RangeBatchNorm2d(8)), study(x, LightNorm2d(8))
    assert 0.001 < exact_width.guarantee_error < 0.1
    assert exact_width.rms_error < light.rms_error < 0.1
    assert light.operations == {"compare": 16384, "add": 24592, "multiply": 8192, "divide": 1}


def test_refuses_more_chunks_than_pairs():
    with pytest.raises(ValueError, match="use fewer chunks"):
        RangeBatchNorm2d(4)(torch.randn(1, 4, 4, 4))


def shapes(count: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Noisy 16 x 16 pictures of stripes: across, down, and along either diagonal."""
    y, x = torch.meshgrid(torch.arange(16.0), torch.arange(16.0), indexing="ij")
    waves = torch.stack([x, y, (x + y) / 1.5, (x - y) / 1.5])
    label = torch.randint(4, (count,), generator=generator)
    frequency = 0.6 + 0.6 * torch.rand(count, 1, 1, generator=generator)
    phase = 6.28 * torch.rand(count, 1, 1, generator=generator)
    picture = torch.sin(waves[label] * frequency + phase)
    return (picture + 2.0 * torch.randn(count, 16, 16, generator=generator))[:, None], label


def trained_accuracy(norm, seed: int) -> float:
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)

    def layer(before, after, groups=1):
        return [torch.nn.Conv2d(before, after, 3, padding=1, groups=groups, bias=False), norm(after), torch.nn.ReLU()]

    parts = [*layer(1, 16), *layer(16, 16, 16), *layer(16, 32), torch.nn.AvgPool2d(2), *layer(32, 32)]
    model = torch.nn.Sequential(*parts, torch.nn.AdaptiveAvgPool2d(1), torch.nn.Flatten(), torch.nn.Linear(32, 4))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        x, label = shapes(64, generator)
        loss = F.cross_entropy(model(x), label)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, label = shapes(2000, torch.Generator().manual_seed(99))
    return (model.eval()(x).argmax(-1) == label).float().mean().item()


@pytest.mark.slow
def test_trains_as_well_as_a_batch_norm():
    exact = [trained_accuracy(torch.nn.BatchNorm2d, seed) for seed in range(3)]
    light = [trained_accuracy(LightNorm2d, seed) for seed in range(3)]
    assert 0.6 < sum(exact) / 3 < 0.999
    assert sum(light) / 3 >= sum(exact) / 3 - 0.01
