"""Perplexity against transformers' own loss, divergence against torch's, noise against its definition."""

import math

import pytest
import torch
from torch import nn

from taut.quality import compare, logits_of, perplexity


class Table(nn.Module):
    """A bigram model: logits are a row of a table."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.table = nn.Parameter(torch.randn(11, 11, generator=generator))

    def forward(self, input_ids):
        return {"logits": self.table[input_ids]}


BATCHES = [torch.randint(11, (2, 9), generator=torch.Generator().manual_seed(1)), torch.arange(5)[None]]


def test_perplexity_is_that_of_transformers():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=2, vocab_size=11, n_positions=16)).eval()
    losses = [(model(input_ids=ids, labels=ids).loss.item(), ids[:, 1:].numel()) for ids in BATCHES]
    mean = sum(loss * count for loss, count in losses) / sum(count for _, count in losses)
    assert perplexity(model, BATCHES) == pytest.approx(math.exp(mean), rel=1e-6)


def test_comparison():
    one, two = Table(0), Table(1)
    quality = compare(one, two, BATCHES)
    x, y = (torch.cat([logits_of(m, ids)[:, :-1].flatten(0, 1) for ids in BATCHES]) for m in (one, two))
    kl = nn.functional.kl_div(y.log_softmax(-1), x.softmax(-1), reduction="batchmean").item()
    assert quality.kl == pytest.approx(kl, rel=1e-12)
    assert quality.sqnr == pytest.approx(10 * math.log10((x.norm() / (x - y).norm()).item() ** 2), rel=1e-12)
    assert quality.agreement == pytest.approx((x.argmax(-1) == y.argmax(-1)).double().mean().item())
    assert quality.perplexity_before == pytest.approx(perplexity(one, BATCHES))
    assert quality.perplexity_after == pytest.approx(perplexity(two, BATCHES))
    assert quality.tokens == 20


def test_a_model_against_itself():
    quality = compare(Table(0), Table(0), BATCHES)
    assert (quality.kl, quality.sqnr, quality.agreement, quality.perplexity_ratio) == (0, math.inf, 1, 1)


def test_refuses_in_words():
    with pytest.raises(ValueError, match="no token to predict"):
        perplexity(Table(0), [torch.ones(3, 1, dtype=torch.long)])

    class Headless(nn.Module):
        def forward(self, input_ids):
            return {"last_hidden_state": input_ids.float()}

    with pytest.raises(ValueError, match="Headless returns no logits"):
        perplexity(Headless(), BATCHES)
