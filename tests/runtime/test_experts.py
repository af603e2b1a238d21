"""Products with chosen experts: each row's own, whatever the dtype, and no weight is copied for it."""

from __future__ import annotations

import functools

import pytest
import torch

from taut.runtime.experts import Experts
from taut.runtime.lower import lower
from taut.runtime.pieces import Piece
from taut.runtime.prepare import prepared
from taut.runtime.step import trace_step
from taut.runtime.steps import Program, Torch
from taut.shrink import tiny_model

EXPERTS, N, K, CHOICES = 6, 40, 24, 2


@pytest.mark.parametrize("rows", [1, 3, 50])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_every_row_meets_its_own_experts(dtype: torch.dtype, rows: int):
    torch.manual_seed(rows)
    weight = (torch.randn(EXPERTS, N, K) / K**0.5).to(dtype)
    x, ids = torch.randn(rows, CHOICES, K), torch.randint(EXPERTS, (rows, CHOICES))
    true = torch.einsum("rck,rcnk->rcn", x.double(), weight[ids].double()).flatten(1)
    (found,) = Experts(weight)(x.flatten(1), ids.float())
    (exact,) = Experts(weight)(x.flatten(1).double(), ids.double())
    plain = torch.einsum("rck,rcnk->rcn", x.to(dtype), weight[ids]).flatten(1)
    error = lambda y: float((y.double() - true).norm() / true.norm())  # noqa: E731
    assert error(found) <= 2 * error(plain) + torch.finfo(torch.float32).eps
    assert error(exact) <= 1e-14
    assert (
        error(Experts(weight)._picked(x.flatten(0, 1), ids.flatten()).view(rows, -1))
        <= 2 * error(plain) + torch.finfo(torch.float32).eps
    )


@functools.cache
def program(name: str) -> Program:
    import transformers

    model = tiny_model(getattr(transformers, name))
    model.set_experts_implementation("eager")
    return lower(prepared(trace_step(model, 16)))


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])  # GptOss keeps its weights turned
def test_no_piece_holds_a_stack_of_experts(name: str):
    steps = [step.run for step in program(name).steps if isinstance(step, Torch)]
    pieces = [run for run in steps if isinstance(run, Piece)]
    assert sum(isinstance(run, Experts) for run in steps) == 4  # two products in each of two layers
    assert pieces
    assert all(constant.ndim < 3 for piece in pieces for constant in piece.constants.values())
