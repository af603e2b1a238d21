"""The gradient theorem of arXiv:1911.07013 on 10,000 random draws."""

import pytest
import torch

from taut.nn.norm.detach_norm import DetachNorm, gradient_moments
from taut.nn.norm.layer_norm_simple import LayerNormSimple


@pytest.fixture
def draw():
    torch.manual_seed(0)
    x = torch.randn(10_000, 24).double() * torch.rand(10_000, 1).double() * 3 + torch.randn(10_000, 1).double()
    upstream = torch.randn(10_000, 24).double() + torch.randn(10_000, 1).double()
    sigma = x.std(-1, correction=0)
    return x, upstream, sigma, upstream.mean(-1), upstream.var(-1, correction=0)


def close(got, want):
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_forward_is_layer_norm(draw):
    torch.testing.assert_close(DetachNorm(24)(draw[0]), LayerNormSimple(24)(draw[0]), rtol=1e-12, atol=1e-12)


def test_both_detached_only_scales_the_gradient(draw):
    x, upstream, sigma, mean, variance = draw
    got = gradient_moments(DetachNorm(24, eps=0.0), x, upstream)
    close(got[0], mean / sigma)
    close(got[1], variance / sigma**2)


def test_the_mean_recentres_the_gradient(draw):
    x, upstream, sigma, _, variance = draw
    got = gradient_moments(DetachNorm(24, eps=0.0, detach_mean=False), x, upstream)
    close(got[0], torch.zeros_like(sigma))
    close(got[1], variance / sigma**2)


def test_the_deviation_shrinks_the_gradient(draw):
    x, upstream, sigma, mean, variance = draw
    got = gradient_moments(DetachNorm(24, eps=0.0, detach_deviation=False), x, upstream)
    close(got[0], mean / sigma)
    assert (got[1] <= variance / sigma**2 * (1 + 1e-12)).all()


def test_layer_norm_does_both(draw):
    x, upstream, sigma, _, variance = draw
    got = gradient_moments(LayerNormSimple(24, eps=0.0), x, upstream)
    close(got[0], torch.zeros_like(sigma))
    assert (got[1] <= variance / sigma**2 * (1 + 1e-12)).all()
    assert (got[1] < 0.99 * variance / sigma**2).any()
