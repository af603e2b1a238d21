import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention.flex_attention import flex_attention

from taut.ops.attention import attention

DRAWS = 16


def inputs(length: int, keys: int) -> tuple[Tensor, Tensor, Tensor]:
    torch.manual_seed(0)
    return torch.randn(2, 6, length, 16), torch.randn(2, 2, keys, 16), torch.randn(2, 2, keys, 16)


def test_equals_torch_in_float64():
    q, k, v = (t.double() for t in inputs(5, 9))
    visible = torch.rand(2, 1, 5, 9) > 0.3
    added = torch.randn(2, 6, 5, 9).double()
    for mask in (None, visible, added):
        expected = F.scaled_dot_product_attention(q, k, v, mask, scale=0.3, enable_gqa=True)
        torch.testing.assert_close(attention(q, k, v, mask, scale=0.3), expected, rtol=1e-12, atol=1e-12)
    q, k, v = (t.double() for t in inputs(9, 9))
    expected = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    torch.testing.assert_close(attention(q, k, v, causal=True), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("length", [1, 5])
def test_score_changes_equal_flex_attention(length: int):
    q, k, v = inputs(length, 9)
    slopes = torch.rand(6)
    hidden = torch.tensor(float("-inf"))

    def change(score: Tensor, _batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        ago = query + 9 - length - key
        score = 2 * torch.tanh(score / 2) - slopes[head] * ago
        return torch.where((ago >= 0) & (ago < 4), score, hidden)

    expected = flex_attention(q, k, v, score_mod=change, enable_gqa=True)
    got = attention(q, k, v, causal=True, window=4, softcap=2.0, alibi=slopes)
    torch.testing.assert_close(got, expected)


@pytest.mark.parametrize("length", [1, 5])
def test_a_sink_is_a_key_that_has_no_value(length: int):
    q, k, v = inputs(length, 9)
    sinks = torch.randn(6)
    scores = q @ k.repeat_interleave(3, 1).mT / 4
    weights = torch.cat((scores, sinks[None, :, None, None].expand(2, 6, length, 1)), -1).softmax(-1)[..., :-1]
    torch.testing.assert_close(attention(q, k, v, sinks=sinks), weights @ v.repeat_interleave(3, 1))


def test_a_query_that_sees_nothing_gives_zeros_and_no_nan_gradient():
    q, k, v = (t.requires_grad_() for t in inputs(2, 3))
    mask = torch.tensor([[True, False, False], [False, False, False]])
    y = attention(q, k, v, mask)
    y.sum().backward()
    assert not y[:, :, 1].any()
    assert all(t.grad is not None and t.grad.isfinite().all() for t in (q, k, v))
    q, k, v = inputs(1, 700)
    assert not attention(q, k, v, torch.zeros(700, dtype=torch.bool), impl="numba").any()


def test_decode_reads_a_cache_in_place_and_only_its_visible_part():
    cache = torch.full((2, 900, 2, 64), float("nan"))
    k, v = (cache.clone().transpose(1, 2)[:, :, 3:803] for _ in range(2))
    for t in (k, v):
        t[:, :, :520] = torch.randn(2, 2, 520, 64)
    q, mask = torch.randn(2, 6, 1, 64), torch.arange(800) < 520
    assert not k.is_contiguous()
    k[:, :, 520:], v[:, :, 520:] = 0, 0
    expected = attention(q[:1], k[:1, :, :520], v[:1, :, :520], impl="reference")
    torch.testing.assert_close(attention(q, k, v, mask, impl="numba")[:1], expected)
    k[:, :, 768:], v[:, :, 768:] = float("nan"), float("nan")
    torch.testing.assert_close(attention(q, k, v, mask, impl="numba")[:1], expected)


def test_decode_does_not_depend_on_the_number_of_threads():
    q, k, v = torch.randn(1, 9, 1, 64), torch.randn(1, 3, 3000, 64), torch.randn(1, 3, 3000, 64)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results.append(attention(q, k, v, impl="numba"))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_a_long_way_from_zero():
    """Scores of several hundred: only a softmax relative to its peak survives them."""
    q, k, v = torch.randn(1, 2, 1, 64) * 30, torch.randn(1, 2, 600, 64), torch.randn(1, 2, 600, 64)
    truth = attention(q.double(), k.double(), v.double())
    error = lambda y: (y.double() - truth).norm() / truth.norm()  # noqa: E731
    plain = error(attention(q, k, v, impl="reference"))
    assert error(attention(q, k, v, impl="numba")) <= 2 * plain + torch.finfo(torch.float32).eps


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("d", [8, 16, 32, 48, 80, 128])
def test_decode_of_any_width_and_group_errs_at_most_twice_as_much_as_plain_code(d: int, dtype: torch.dtype):
    """In the mean of the greatest errors of many draws: of one alone, two to six of 4800 are not."""
    for group in (1, 2, 3, 5):
        errors = torch.zeros(3, dtype=torch.float64)
        for _ in range(DRAWS):
            q, k, v = (torch.randn(1, heads, rows, d).to(dtype) for heads, rows in ((2 * group, 1), (2, 39), (2, 39)))
            exact = attention(q.double(), k.double(), v.double(), impl="reference")
            plain = attention(q, k, v, impl="reference")
            fast = attention(q, k, v, impl="numba")
            greatest = [(y.double() - exact).abs().max() for y in (fast, plain)]
            errors += torch.stack([*greatest, exact.abs().max()]) / DRAWS
        assert errors[0] <= 2 * errors[1] + torch.finfo(dtype).eps * errors[2]
