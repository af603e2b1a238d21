import numpy as np
import pytest
import torch

from taut.ops import _dispatch
from taut.ops._weights import dequantize, quantize
from taut.ops.linear import linear


def test_equals_numpy():
    x, weight, bias = torch.randn(2, 3, 20).double(), torch.randn(7, 20).double(), torch.randn(7).double()
    expected = x.numpy() @ weight.numpy().T + bias.numpy()
    np.testing.assert_allclose(linear(x, weight, bias).numpy(), expected, rtol=1e-13, atol=1e-13)


@pytest.mark.parametrize("bits", [8, 4])
def test_quantizing_moves_a_weight_by_at_most_half_a_step(bits: int):
    weight = torch.randn(16, 64)
    stored, scale = quantize(weight, bits)
    assert stored.numel() * stored.element_size() == weight.numel() * bits // 8
    step = scale.float().abs()[:, None] if bits == 8 else scale.float().abs().repeat_interleave(32, -1)
    moved = (dequantize(stored, scale, torch.float32) - weight).abs()
    # Four bits: the code opposite to the group's extreme is clipped by up to one step, and the scale is rounded.
    assert (moved <= step * (0.5 if bits == 8 else 1.01) * (1 + 1e-5)).all()
    assert (moved.square().mean() <= step.square().mean() / 10).all()


def test_four_bits_are_stored_as_in_q4_0():
    weight = torch.arange(-16.0, 16.0)[None]
    stored, scale = quantize(weight, 4)
    assert scale.tolist() == [[2.0]]
    assert (stored[0] & 15).tolist() == [c // 2 + c % 2 * (c // 2 % 2) for c in range(16)]
    assert torch.equal(dequantize(stored, scale, torch.float32).round(), dequantize(stored, scale, torch.float32))


def test_zeros_stay_zeros():
    for bits in (8, 4):
        assert not dequantize(*quantize(torch.zeros(2, 32), bits), torch.float32).any()


def test_unknown_formats_are_refused():
    with pytest.raises(ValueError, match="no known format"):
        linear(torch.randn(1, 4), torch.ones(2, 4, dtype=torch.int8))
    with pytest.raises(ValueError, match="multiple of 32"):
        quantize(torch.ones(2, 40), 4)


def test_many_tokens_are_left_to_torch(monkeypatch):
    monkeypatch.setattr(_dispatch, "table", lambda threads: ())
    x, weight = torch.randn(17, 8), torch.randn(4, 8)
    assert "more than 4 tokens" in dict(linear.explain(x, weight))["numba"]
    assert dict(linear.explain(x, weight.bfloat16()))["numba"] == "more than 16 tokens"


@pytest.mark.parametrize("stored", [torch.float32, torch.bfloat16, torch.float16, 8, 4])
def test_the_result_depends_neither_on_the_number_of_threads_nor_on_other_tokens(stored: torch.dtype | int):
    x, weight = torch.randn(3, 608), torch.randn(301, 608)
    weight, scale = quantize(weight, stored) if isinstance(stored, int) else (weight.to(stored), None)
    threads = torch.get_num_threads()
    results = []
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            results += [torch.cat([linear(some, weight, scale=scale, impl="numba") for some in x.split(at_once)])
                        for at_once in (3, 1)]  # fmt: skip
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(result, results[0]) for result in results[1:])


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_every_stored_number_is_read_right(dtype: torch.dtype):
    """All 65536 patterns, one by one, against torch's own conversion, and back."""
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(dtype)[:, None]
    got = linear(torch.ones(1, 1), every, impl="numba")[0]
    torch.testing.assert_close(got, every[:, 0].float(), rtol=0, atol=0, equal_nan=True)
    back = linear(torch.ones(1, 1, dtype=dtype), every, impl="numba")[0]
    torch.testing.assert_close(back, every[:, 0], rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_results_are_rounded_to_nearest_even(dtype: torch.dtype):
    weight = torch.randn(20_000, 1) * torch.logspace(-9, 5, 20_000)[:, None]
    got = linear(torch.ones(1, 1, dtype=dtype), weight, impl="numba")[0]
    assert torch.equal(got, weight[:, 0].to(dtype))
