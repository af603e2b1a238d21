"""What every file of taut.nn.norm promises, found by listing the folder."""

import copy
import re

import pytest
import torch
from torch import Tensor, nn
from twice import as_accurate

from taut import catalogue

FILES = list(catalogue.modules("taut.nn.norm"))


def make(*shape: int) -> Tensor:
    return torch.randn(*shape)


CASES = [
    pytest.param(module, index, id=f"{module.__name__.rpartition('.')[2]}-{index}")
    for module in FILES
    for index in range(len(list(module.cases(make))))
]
every_case = pytest.mark.parametrize(("module", "index"), CASES)


def build(module, index: int, dtype: torch.dtype = torch.float32) -> tuple[nn.Module, list[Tensor]]:
    torch.manual_seed(index)
    norm, inputs = list(module.cases(make))[index]
    return norm.to(dtype), [x.to(dtype).requires_grad_() if x.is_floating_point() else x for x in inputs]


def outputs(result) -> tuple[Tensor, ...]:
    return (result,) if isinstance(result, Tensor) else tuple(result)


def run(norm: nn.Module, inputs: list[Tensor]) -> tuple[Tensor, ...]:
    """Outputs of a copy, so that running statistics of one call do not reach the next."""
    return outputs(copy.deepcopy(norm)(*inputs))


def true_outputs(module, index: int) -> tuple[Tensor, ...]:
    norm, inputs = build(module, index, torch.float64)
    return run(norm, inputs)


@pytest.mark.parametrize("module", FILES, ids=lambda m: m.__name__.rpartition(".")[2])
def test_names_its_source(module):
    assert re.search(r"^Source: (.+\n)*?.*(arXiv:\d{4}\.\d{4,5}|https?://)", module.__doc__, re.M)


@every_case
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_keeps_dtype_and_stays_finite(module, index, dtype):
    norm, inputs = build(module, index, dtype)
    for y in run(norm, inputs):
        assert y.dtype == dtype
        assert y.isfinite().all()


@every_case
def test_zeros_stay_finite(module, index):
    norm, inputs = build(module, index)
    zeros = [torch.zeros_like(x) if x.is_floating_point() else x for x in inputs]
    assert all(y.isfinite().all() for y in run(norm, zeros))


@every_case
def test_memory_layout_does_not_matter(module, index):
    norm, inputs = build(module, index)
    spread = [torch.stack([x, x], -1)[..., 0] for x in inputs]
    assert not any(x.is_contiguous() for x in spread)
    for got, want, truth in zip(run(norm, spread), run(norm, inputs), true_outputs(module, index), strict=True):
        assert as_accurate(got, want, truth)


@every_case
def test_knows_its_shapes_without_data(module, index):
    norm, inputs = build(module, index)
    got = run(norm.to("meta"), [x.to("meta") for x in inputs])
    norm, inputs = build(module, index)
    assert [y.shape for y in got] == [y.shape for y in run(norm, inputs)]


@every_case
def test_state_survives_saving(module, index):
    norm, inputs = build(module, index)
    with torch.no_grad():
        for tensor in [*norm.parameters(), *norm.buffers()]:
            if tensor.is_floating_point():
                tensor.mul_(1.5).add_(0.125)
    fresh, _ = build(module, index)
    fresh.load_state_dict(norm.state_dict(), strict=True)
    for got, want in zip(run(fresh, inputs), run(norm, inputs), strict=True):
        assert torch.equal(got, want)


@every_case
def test_gradient_is_the_derivative(module, index):
    norm, inputs = build(module, index, torch.float64)
    if not getattr(norm, "exact_gradient", True):
        pytest.skip("its backward is not the derivative of its forward, by design")
    differentiable = [x.requires_grad_() for x in inputs if x.is_floating_point()]
    names, parameters = zip(*norm.named_parameters(), strict=True) if list(norm.parameters()) else ((), ())

    def call(*values):
        given = iter(values)
        x = [next(given) if i.is_floating_point() else i for i in inputs]
        return torch.func.functional_call(norm, dict(zip(names, given, strict=True)), tuple(x))

    assert torch.autograd.gradcheck(call, (*differentiable, *parameters))


@every_case
def test_compiles_whole_with_its_gradient(module, index):
    torch._dynamo.reset()
    plain, inputs = build(module, index)
    norm = copy.deepcopy(plain)
    results = [outputs(plain(*inputs)), outputs(torch.compile(norm, fullgraph=True, backend="aot_eager")(*inputs))]
    wide, exact = build(module, index, torch.float64)
    results.append(outputs(wide(*exact)))
    for want, got, truth in zip(*results, strict=True):
        assert as_accurate(got, want, truth)
    slopes = [gradients(result, given) for result, given in zip(results, (inputs, inputs, exact), strict=True)]
    for want, got, truth in zip(*slopes, strict=True):
        assert (got is None) == (want is None)
        if want is not None:
            assert as_accurate(got, want, truth)


def gradients(result: tuple[Tensor, ...], inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """Of the outputs with respect to the inputs; None where a unit that is only emulated has none."""
    upstream = [torch.linspace(-1, 1, y.numel(), dtype=y.dtype).view_as(y) for y in result]
    return torch.autograd.grad(result, [x for x in inputs if x.requires_grad], upstream, allow_unused=True)
