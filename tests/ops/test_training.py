"""Gradients of the products behind a norm."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from taut.ops._activation import ACTIVATIONS
from taut.ops._training import NormGlu, NormLinear
from taut.ops.norm_glu import norm_glu
from taut.ops.norm_linear import norm_linear


def make(*size: int) -> Tensor:
    return torch.randn(*size, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("batch", [(), (4,), (2, 3)], ids=str)
def test_norm_linear_in_float64(batch: tuple[int, ...]):
    x, weight, gain, bias = make(*batch, 6), make(5, 6), make(6), make(5)
    assert torch.autograd.gradcheck(lambda *t: NormLinear.apply(*t, 1e-3), (x, weight, gain, bias))
    assert torch.autograd.gradcheck(lambda x, w: NormLinear.apply(x, w, None, None, 1e-3), (x, weight))


@pytest.mark.parametrize("act", ACTIVATIONS)
def test_norm_glu_in_float64(act: str):
    x, gate, up, gain = make(2, 3, 6), make(5, 6), make(5, 6), make(6)
    assert torch.autograd.gradcheck(lambda *t: NormGlu.apply(*t, 1e-3, act), (x, gate, up, gain))


def test_only_what_is_asked_for_gets_a_gradient():
    x, gate, up = torch.randn(3, 6), torch.randn(5, 6), torch.randn(5, 6, requires_grad=True)
    norm_glu(x, gate, up).sum().backward()
    expected = torch.autograd.grad(norm_glu.reference(x, gate, up).sum(), up)[0]
    assert x.grad is None
    assert gate.grad is None
    torch.testing.assert_close(up.grad, expected)


def test_keeps_the_raw_stream_and_no_normalised_one():
    x, weight = torch.randn(3, 64, requires_grad=True), torch.randn(8, 64, requires_grad=True)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        norm_linear(x, weight)
    assert {t.data_ptr() for t in kept} == {x.data_ptr(), weight.data_ptr()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_gradients_are_as_accurate_as_unfused_code(dtype: torch.dtype):
    torch.manual_seed(0)
    args = [torch.randn(*size) for size in ((20, 64), (48, 64), (64,), (48,))]
    dy = torch.randn(20, 48).to(dtype)
    fast, plain, wide = ([a.to(dtype).to(d).requires_grad_() for a in args] for d in (dtype, dtype, torch.float64))
    found = torch.autograd.grad(norm_linear(*fast), fast, dy)
    unfused = torch.nn.functional.linear(
        torch.nn.functional.rms_norm(plain[0], (64,), plain[2], 1e-6), plain[1], plain[3]
    )
    truth = torch.autograd.grad(norm_linear.reference(*wide), wide, dy.double())
    for y, p, t in zip(found, torch.autograd.grad(unfused, plain, dy), truth, strict=True):
        assert (y.double() - t).norm() <= 2 * (p.double() - t).norm() + torch.finfo(dtype).eps * t.norm()
