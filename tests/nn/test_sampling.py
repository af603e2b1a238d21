import math

import pytest
import torch
from twice import as_accurate

from taut.nn.sampling import Sample, gumbel, merge_samples, philox, random_words, sample_lm_head

KNOWN = [
    ((0, 0, 0, 0), (0, 0), (0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8)),
    ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2, (0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD)),
    (
        (0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344),
        (0xA4093822, 0x299F31D0),
        (0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1),
    ),
]


@pytest.mark.parametrize(("counter", "key", "want"), KNOWN)
def test_philox_gives_the_published_words(counter, key, want):
    """The known-answer vectors of Random123, the generator's own library."""
    got = philox(tuple(torch.tensor([c]) for c in counter), key)
    assert tuple(word.item() for word in got) == want


def test_a_token_s_noise_does_not_depend_on_its_neighbours():
    every = random_words(7, 5, 0, 100)
    for start, stop in ((0, 100), (3, 4), (17, 42), (98, 100)):
        assert torch.equal(random_words(7, 3, start, stop), every[:3, start:stop])
    assert not torch.equal(random_words(8, 5, 0, 100), every)
    assert every.unique().numel() == 500


def problem(batch: int = 6, vocab: int = 203, d: int = 32):
    torch.manual_seed(0)
    return torch.randn(batch, d), torch.randn(vocab, d) * 0.3


@pytest.mark.parametrize("k", [None, 1, 40])
@pytest.mark.parametrize("tile", [1, 30, 64, 203])
def test_tiling_does_not_change_the_draw(tile, k):
    h, weight = problem()
    mask = torch.rand(6, 203) > 0.2
    temperature = torch.tensor([0.0, 0.5, 1.0, 2.0, 5.0, 100.0])
    want = sample_lm_head(h, weight, temperature, mask, seed=3, k=k, tile=4096)
    got = sample_lm_head(h, weight, temperature, mask, seed=3, k=k, tile=tile)
    assert torch.equal(got.ids, want.ids)
    assert as_accurate(got.log_z, want.log_z, want.log_z.double())
    assert mask[torch.arange(6), got.ids].all()


def test_same_seed_same_draw_other_seed_other_draw():
    h, weight = problem(64)
    draws = [sample_lm_head(h, weight, seed=s, step=t).ids for s, t in ((1, 0), (1, 0), (2, 0), (1, 1))]
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] != draws[2]).float().mean() > 0.5
    assert (draws[0] != draws[3]).float().mean() > 0.5


def test_greedy_is_argmax_and_log_z_is_logsumexp():
    h, weight = problem()
    logits = (h.double() @ weight.double().T).float()
    got = sample_lm_head(h, weight, 0.0, seed=5)
    assert torch.equal(got.ids, logits.argmax(-1))
    half = sample_lm_head(h, weight, 0.5, seed=5)
    assert as_accurate(half.log_z, (logits / 0.5).logsumexp(-1), (h.double() @ weight.double().T / 0.5).logsumexp(-1))


def test_top_k_keeps_the_lower_index_among_equals():
    h, weight = torch.ones(2000, 1), torch.tensor([[0.0], [1.0], [1.0], [1.0], [-1.0]])
    drawn = sample_lm_head(h, weight, k=2, tile=2)
    assert set(drawn.ids.tolist()) == {1, 2}
    torch.testing.assert_close(drawn.log_z, torch.full((2000,), 1 + math.log(2)))


def test_a_norm_s_scalar_is_a_temperature():
    h, weight = problem(256)
    rms = h.pow(2).mean(-1).sqrt()
    want = sample_lm_head(h / rms[:, None], weight, 0.8, seed=1).ids
    assert (sample_lm_head(h, weight, 0.8 * rms, seed=1).ids == want).all()


def chi_square_p(counts: torch.Tensor, p: torch.Tensor) -> float:
    """P(a chi-square value at least as large), cells with fewer than 10 expected counts thrown together."""
    expected = p * counts.sum()
    rare = expected < 10
    groups = [(counts[~rare], expected[~rare]), (counts[rare].sum()[None], expected[rare].sum()[None])]
    observed, expected = (torch.cat(part).double() for part in zip(*groups, strict=True))
    observed, expected = observed[expected > 0], expected[expected > 0]
    statistic = ((observed - expected).pow(2) / expected).sum()
    return torch.special.gammaincc(torch.tensor((len(observed) - 1) / 2).double(), statistic / 2).item()


def draw_counts(vocab: int, draws: int) -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    weight = torch.randn(vocab, 1) * 2
    counts, batch = torch.zeros(vocab, dtype=torch.int64), 2**18 // vocab
    for seed in range(draws // batch):
        ids = sample_lm_head(torch.ones(batch, 1), weight, seed=seed, tile=vocab).ids
        counts += torch.bincount(ids, minlength=vocab)
    return counts, weight[:, 0].double().softmax(0)


def test_draws_follow_softmax():
    assert chi_square_p(*draw_counts(512, 20_000)) > 0.01


def test_the_chi_square_would_notice():
    counts, p = draw_counts(512, 20_000)
    assert chi_square_p(counts, (p.log() / 1.05).softmax(0)) < 1e-3


@pytest.mark.slow
def test_ten_million_draws_follow_softmax():
    assert chi_square_p(*draw_counts(512, 10_000_000)) > 0.01


@pytest.mark.gpu
def test_ten_million_draws_from_a_real_vocabulary_follow_softmax():
    """32,000 tokens: on a CPU that is 3e11 random words, hours of work."""
    from taut.ops._triton.launch import sample_lm_head as kernel

    torch.manual_seed(1)
    vocab, batch, draws = 32_000, 4096, 10_000_000
    weight = torch.zeros(vocab, 64, device="cuda").bfloat16()
    weight[:, 0] = torch.randn(vocab, device="cuda") * 2
    x, heat = torch.zeros(batch, 64, device="cuda").bfloat16(), torch.ones(batch, device="cuda")
    x[:, 0] = 1
    counts = torch.zeros(vocab, dtype=torch.int64, device="cuda")
    for step in range(-(-draws // batch)):
        ids, _ = kernel(x, weight, heat, torch.tensor([7, step], device="cuda"))
        counts += torch.bincount(ids, minlength=vocab)
    p = weight[:, 0].double().softmax(0)
    assert chi_square_p(counts.cpu(), p.cpu()) > 0.01
    assert chi_square_p(counts.cpu(), (p.log() / 1.01).softmax(0).cpu()) < 1e-3


def naive_gumbel(words: torch.Tensor) -> torch.Tensor:
    """What float32 kernels commonly do: u on a grid of 2^-24, fine near 0, coarse near 1."""
    u = ((words >> 8).float() * 2.0**-24).clamp(min=2.0**-25)
    return -torch.log(-torch.log(u))


def smallest_two(vocab: int, draws: int) -> torch.Tensor:
    """The two smallest of `vocab` random 32-bit words, [draws, 2], from the law of order statistics."""
    exponential = -torch.log1p(-torch.rand(2, draws, dtype=torch.float64))
    first = -torch.expm1(-exponential[0] / vocab)
    second = -torch.expm1(torch.log1p(-first) - exponential[1] / (vocab - 1))
    return (torch.stack([first, second], 1) * 2.0**32).long()


def test_ties_at_the_top_are_rare_where_the_usual_noise_ties_often():
    torch.manual_seed(0)
    low = smallest_two(152_000, 1_000_000)

    def tied(noise):
        return (noise[:, 0] == noise[:, 1]).double().mean().item()

    # two of 152,000 32-bit words agree at the bottom in half of one case out of their mean spacing
    assert tied(gumbel(low)) == pytest.approx(152_000 / 2**33, abs=1.5e-5)
    assert tied(naive_gumbel(0xFFFFFFFF - low)) == pytest.approx(0.004, rel=0.25)


def test_the_noise_reaches_further_up():
    extremes = torch.tensor([0, 0xFFFFFFFF])
    assert gumbel(extremes)[0] == pytest.approx(33 * math.log(2), rel=1e-6)
    assert gumbel(extremes).isfinite().all()
    assert naive_gumbel(extremes)[1] == pytest.approx(24 * math.log(2), rel=1e-6)


def test_merged_groups_have_the_law_of_the_whole():
    torch.manual_seed(0)
    logits = torch.randn(3, 5).double()
    shares = logits.logsumexp(1)
    running, keep = shares[0], torch.ones(3).double()
    for group in (1, 2):
        wins = torch.sigmoid(shares[group] - running)
        keep[:group] *= 1 - wins
        keep[group] = wins
        running = torch.logaddexp(running, shares[group])
    whole = logits.flatten().softmax(0).view(3, 5)
    torch.testing.assert_close(keep[:, None] * logits.softmax(1), whole, rtol=1e-12, atol=1e-12)


def test_merging_draws_from_two_shards():
    torch.manual_seed(0)
    draws, logits = 40_000, torch.randn(12).double()
    noise = torch.rand(draws).double()
    parts = [
        Sample(torch.multinomial(part.softmax(0), draws, replacement=True) + at, part.logsumexp(0).expand(draws))
        for part, at in ((logits[:5], 0), (logits[5:], 5))
    ]
    merged = merge_samples(*parts, noise)
    assert chi_square_p(torch.bincount(merged.ids, minlength=12), logits.softmax(0)) > 0.01
    torch.testing.assert_close(merged.log_z, logits.logsumexp(0).expand(draws))


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"temperature": -1.0}, "negative"),
        ({"k": 0}, "at least 1"),
        ({"mask": torch.zeros(203, dtype=torch.bool)}, "allows no token"),
    ],
)
def test_refuses_what_has_no_answer(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        sample_lm_head(*problem(), **arguments)
