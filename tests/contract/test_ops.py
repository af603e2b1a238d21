"""What every op and every implementation of it must do, over everything that the catalogue finds."""

from __future__ import annotations

import re
import sys

import pytest
import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_leaves, tree_map, tree_map_only

from taut.catalogue import find
from taut.op import Op
from taut.ops import _dispatch

OPS = find("taut.ops", Op)
WAYS = [
    (name, way) for name, op in OPS.items() for way in ["reference", *(i.name for i in op.impls if i.name != "triton")]
]
"""The Triton kernels have tests of their own, which run on a CPU through its interpreter: tests/ops/test_triton.py."""
IMPLS = [(name, way) for name, way in WAYS if way != "reference"]
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(autouse=True)
def _each_product_wins_somewhere(monkeypatch):
    """A made-up table: which product is the fastest here would otherwise decide which ones are tested."""
    rows = tuple(_dispatch.Entry(str(d).removeprefix("torch."), 64, 64, 4, 20, {}) for d in DTYPES)
    monkeypatch.setattr(_dispatch, "table", lambda threads: rows)


def cases(op: Op, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    torch.manual_seed(0)
    assert op.cases is not None, f"{op.name} declares no test cases"
    return list(op.cases(lambda *shape: torch.randn(*shape, dtype=torch.float64).to(dtype)))


def fitting(op: Op, way: str, dtype: torch.dtype) -> list[tuple[tuple, dict]]:
    """The cases that a way of computing the op takes."""
    if way == "reference":
        return cases(op, dtype)
    return [(args, kwargs) for args, kwargs in cases(op, dtype) if dict(op.explain(*args, **kwargs))[way] == "fits"]


def cast(tree, dtype: torch.dtype):
    return tree_map_only(Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, tree)


def error(y: Tensor, truth: Tensor) -> float:
    return float((y.double() - truth).norm() / truth.norm().clamp_min(torch.finfo(torch.float64).tiny))


def check(fast, plain, truth, dtype: torch.dtype) -> None:
    """Every output errs at most twice as much as plain code does, plus one ulp; discrete ones are equal."""
    for y, p, t in zip(tree_leaves(fast), tree_leaves(plain), tree_leaves(truth), strict=True):
        assert y.shape == t.shape
        if y.is_floating_point():
            assert error(y, t) <= 2 * error(p, t) + ulp(y, dtype)
        else:
            assert torch.equal(y, t), "a discrete result differs from float64's"


def ulp(y: Tensor, like: torch.dtype) -> float:
    """One unit in the last place, relative, of an output or of what it was computed from."""
    return max(torch.finfo(y.dtype).eps, 0.0 if like == torch.float64 else torch.finfo(torch.float32).eps)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("name", "way"), WAYS)
def test_is_as_accurate_as_plain_code(name: str, way: str, dtype: torch.dtype):
    op = OPS[name]
    for args, kwargs in fitting(op, way, dtype):
        fast = op(*args, impl=way, **kwargs)
        plain = cast(op.reference(*cast(args, torch.float32), **cast(kwargs, torch.float32)), dtype)
        truth = op.reference(*cast(args, torch.float64), **cast(kwargs, torch.float64))
        check(fast, plain, truth, dtype)


@pytest.mark.parametrize(("name", "way"), IMPLS)
def test_an_implementation_runs_some_case_in_every_dtype_it_takes(name: str, way: str):
    assert any(fitting(OPS[name], way, dtype) for dtype in DTYPES)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_writes_every_element(name: str, way: str):
    op = OPS[name]
    before = torch.utils.deterministic.fill_uninitialized_memory, torch.are_deterministic_algorithms_enabled()
    for args, kwargs in fitting(op, way, torch.float32):
        expected = op(*args, impl=way, **kwargs)
        try:
            torch.utils.deterministic.fill_uninitialized_memory = True
            torch.use_deterministic_algorithms(True)
            poisoned = op(*args, impl=way, **kwargs)
        finally:
            torch.utils.deterministic.fill_uninitialized_memory = before[0]
            torch.use_deterministic_algorithms(before[1])
        torch.testing.assert_close(poisoned, expected, rtol=0, atol=0)


def among_nan(t: Tensor) -> Tensor:
    """The same values, every second element of memory that holds NaN (or the dtype's greatest number) otherwise."""
    if t.dim() == 0:
        return t
    junk = float("nan") if t.is_floating_point() else (t.dtype == torch.bool or torch.iinfo(t.dtype).max)
    room = torch.full((*t.shape[:-1], 2 * t.shape[-1] + 1), junk, dtype=t.dtype)
    room[..., 1::2] = t
    return room[..., 1::2]


@pytest.mark.parametrize("name", OPS)
def test_takes_inputs_with_gaps_and_reads_nothing_between(name: str):
    op = OPS[name]
    for args, kwargs in cases(op, torch.float32):
        plain = op.reference(*args, **kwargs)
        truth = op.reference(*cast(args, torch.float64), **cast(kwargs, torch.float64))
        got = op(*tree_map_only(Tensor, among_nan, args), **tree_map_only(Tensor, among_nan, kwargs))
        check(got, plain, truth, torch.float32)


@pytest.mark.parametrize(("name", "way"), IMPLS)
def test_nan_comes_through_where_the_reference_lets_it_through(name: str, way: str):
    op = OPS[name]
    for args, kwargs in fitting(op, way, torch.float32):
        first = args[0].clone()
        if not first.is_floating_point():
            continue
        first.view(-1)[first.numel() // 2] = float("nan")
        expected = tree_leaves(op.reference(first, *args[1:], **kwargs))
        for y, e in zip(tree_leaves(op(first, *args[1:], impl=way, **kwargs)), expected, strict=True):
            assert torch.equal(y.isnan(), e.isnan())


@pytest.mark.parametrize("name", OPS)
def test_gradients(name: str):
    op = OPS[name]
    for args, kwargs in cases(op, torch.float64)[:4]:
        leaves, spec = tree_flatten((args, kwargs))
        places = [i for i, leaf in enumerate(leaves) if isinstance(leaf, Tensor) and leaf.dtype == torch.float64]

        def run(*inputs: Tensor, leaves=leaves, spec=spec, places=places):
            filled = list(leaves)
            for i, value in zip(places, inputs, strict=True):
                filled[i] = value
            args, kwargs = torch.utils._pytree.tree_unflatten(filled, spec)
            outputs = tree_leaves(op(*args, **kwargs))
            return tuple(y for y in outputs if y.is_floating_point())

        inputs = [leaves[i].detach().clone().requires_grad_() for i in places]
        if run(*inputs):
            assert torch.autograd.gradcheck(run, inputs, fast_mode=True)


@pytest.mark.parametrize(("name", "way"), IMPLS)
def test_an_implementation_has_gradients_or_says_that_it_has_none(name: str, way: str):
    op = OPS[name]
    args, kwargs = fitting(op, way, torch.float32)[0]
    if not args[0].is_floating_point():
        return
    args = (args[0].clone().requires_grad_(), *args[1:])
    verdict = dict(op.explain(*args, **kwargs))[way]
    if verdict == "fits":

        def slope(way: str, dtype: torch.dtype) -> Tensor:
            x, *others = cast(args, dtype)
            x = x.detach().requires_grad_()
            outputs = tree_leaves(op(x, *others, impl=way, **cast(kwargs, dtype)))
            return torch.autograd.grad(sum(y.double().sum() for y in outputs), x)[0]

        plain, truth = slope("reference", torch.float32), slope("reference", torch.float64)
        check(slope(way, torch.float32), plain, truth, torch.float32)
    else:
        assert "gradient" in verdict


@pytest.mark.parametrize("name", OPS)
def test_meta_tensors_give_the_same_shapes(name: str):
    op = OPS[name]
    for args, kwargs in cases(op, torch.bfloat16):
        meta = op(
            *tree_map_only(Tensor, lambda t: t.to("meta"), args),
            **tree_map_only(Tensor, lambda t: t.to("meta"), kwargs),
        )
        for m, y in zip(tree_leaves(meta), tree_leaves(op(*args, **kwargs)), strict=True):
            assert m.device.type == "meta"
            assert (m.shape, m.dtype) == (y.shape, y.dtype)


@pytest.mark.parametrize(("name", "way"), WAYS)
def test_compiles_whole(name: str, way: str):
    op = OPS[name]
    for args, kwargs in fitting(op, way, torch.float32)[:2]:
        torch._dynamo.reset()
        compiled = torch.compile(lambda a, k: op(*a, impl=way, **k), fullgraph=True, backend="eager")
        torch.testing.assert_close(compiled(args, kwargs), op(*args, impl=way, **kwargs))
        chosen = torch.compile(lambda a, k: op(*a, **k), fullgraph=True, backend="eager")
        torch.testing.assert_close(chosen(args, kwargs), op(*args, **kwargs))


@pytest.mark.parametrize("name", OPS)
def test_asking_by_name_never_falls_back(name: str):
    op = OPS[name]
    args, kwargs = cases(op, torch.float32)[0]
    with pytest.raises(KeyError, match="no implementation"):
        op(*args, impl="abacus", **kwargs)
    meta_args, meta_kwargs = tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, (args, kwargs))
    for impl in op.impls:
        reason = impl.when(*meta_args, **meta_kwargs)
        if reason is not None:
            with pytest.raises(RuntimeError, match=re.escape(reason)):
                op(*meta_args, impl=impl.name, **meta_kwargs)


@pytest.mark.parametrize("name", OPS)
def test_explains_every_implementation(name: str):
    op = OPS[name]
    for args, kwargs in cases(op, torch.float32):
        answers = op.explain(*args, **kwargs)
        assert [way for way, _ in answers] == [*(i.name for i in op.impls), "reference"]
        assert all(isinstance(answer, str) and answer for _, answer in answers)


@pytest.mark.parametrize("name", OPS)
def test_least_work_is_declared_and_needs_no_data(name: str):
    op = OPS[name]
    assert op.work is not None, f"{name} declares no least work"
    for args, kwargs in cases(op, torch.bfloat16):
        work = op.work(*args, **kwargs)
        meta_args, meta_kwargs = tree_map(lambda a: a.to("meta") if isinstance(a, Tensor) else a, (args, kwargs))
        assert op.work(*meta_args, **meta_kwargs) == work
        written = sum(y.numel() * y.element_size() for y in tree_leaves(op.reference(*args, **kwargs)))
        assert work.flops >= 0
        assert work.bytes >= written > 0


@pytest.mark.parametrize("name", OPS)
def test_names_its_source(name: str):
    doc = sys.modules[OPS[name].reference.__module__].__doc__ or ""
    assert re.search(r"^Source: .+", doc, re.M), "the module's docstring has no Source:"
    source = doc[doc.index("Source:") :]
    assert re.search(r"arXiv:\d{4}\.\d{4,5}|https?://", source)
    assert OPS[name].__doc__
