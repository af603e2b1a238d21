"""The Triton kernels: through the interpreter on any machine, and every shipped configuration on a GPU."""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_leaves

from taut.ops.add_rms_norm import add_rms_norm
from taut.ops.decode_attention import decode_attention
from taut.ops.layer_norm_linear import layer_norm_linear
from taut.ops.linear_residual import linear_residual
from taut.ops.norm_glu import norm_glu
from taut.ops.norm_linear import norm_linear
from taut.ops.rms_norm import rms_norm

CASES = Path(__file__).with_name("triton_cases.py")


@functools.cache
def cases(device: str) -> list[tuple[str, float, float]]:
    """(name, error, plain error in the working dtype) of every case, from one process."""
    where = dict(os.environ, TRITON_INTERPRET="1" if device == "cpu" else "0")
    done = subprocess.run([sys.executable, CASES, device], capture_output=True, text=True, env=where, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line.rsplit(" ", 2) for line in done.stdout.splitlines())
    return [(name, float(error), float(plain)) for name, error, plain in lines]


@pytest.mark.parametrize(
    ("kernel", "count"),
    [
        ("norm_linear", 7),
        ("linear", 7),
        ("norm_glu", 14),
        ("summed", 4),
        ("layer_norm_linear", 28),
        ("row_squares", 1),
        ("norm_rows", 1),
        ("add_norm_rows", 1),
        ("add_rows", 1),
        ("glu_rows", 2),
        ("rope_append", 2),
        ("norm_slopes", 8),
        ("glu_slopes", 16),
        ("decode", 15),
        ("sample", 6),
        ("kept", 4),
        ("read", 1),
    ],
)
@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels_are_as_accurate_as_plain_code(kernel: str, count: int, device: str):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("TRITON KERNELS NOT TESTED: Triton is not installed")
    found = [case for case in cases(device) if case[0].startswith(kernel)]
    assert len(found) == count
    for name, error, plain in found:
        assert error <= 2 * plain + torch.finfo(torch.float32).eps, name


def test_refuses_in_words_without_a_gpu():
    x, weight = torch.randn(1, 64).bfloat16(), torch.randn(32, 64).bfloat16()
    assert dict(norm_linear.explain(x, weight))["triton"] == "a tensor is on cpu"
    with pytest.raises(RuntimeError, match="a tensor is on cpu"):
        norm_linear(x, weight, impl="triton")
    cache = torch.randn(1, 1, 8, 64).bfloat16()
    assert dict(decode_attention.explain(x[None], cache, cache, torch.tensor([8])))["triton"] == "a tensor is on cpu"


def test_importing_taut_does_not_import_triton():
    check = (
        "import sys, taut.ops.norm_linear, taut.ops.decode_attention; sys.exit('taut.ops._triton' in str(sys.modules))"
    )
    assert subprocess.run([sys.executable, "-c", check], check=False).returncode == 0


@pytest.mark.gpu
def test_every_configuration_of_the_table_is_right_and_repeats_itself_under_load():
    from taut.ops._triton import choice, tune

    torch.manual_seed(0)
    rows = choice.table("NVIDIA H200")
    assert len(rows) > 30
    load, done = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda").bfloat16()
    for row in rows:
        shape = tune.Shape(row["k"], row["n"], row["kind"])
        if row["config"] is None:
            continue
        config = choice.Config(*row["config"])
        found, plain = tune.errors_of(shape, row["tokens"], [config])
        assert found[config] <= 2 * plain, row
        x, (weight,), (up,) = tune.inputs(shape, row["tokens"], 1)
        first, wrong = tune.fused(x, weight, up, config), torch.zeros((), dtype=torch.int64, device="cuda")
        for i in range(1000):
            if i % 10 == 0:
                with torch.cuda.stream(load):
                    done @ done
            wrong += (tune.fused(x, weight, up, config) != first).any()
        assert wrong == 0, row


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 7, 64, 65, 300])
def test_ops_on_a_gpu_are_as_accurate_as_torch(tokens: int):
    torch.manual_seed(0)
    x, weight, up, residual = (
        torch.randn(size, device="cuda").bfloat16() for size in ((tokens, 576), (960, 576), (960, 576), (tokens, 960))
    )
    gain = torch.randn(576, device="cuda").bfloat16()
    for op, args, plainly in (
        (norm_linear, (x, weight), unfused_linear),
        (norm_linear, (x, weight, gain), unfused_linear),
        (norm_glu, (x, weight, up), unfused_glu),
        (norm_glu, (x, weight, up, gain), unfused_glu),
        (layer_norm_linear, (x, weight), lambda x, weight: F.linear(F.layer_norm(x, (576,)), weight)),
        (linear_residual, (x, weight, residual), lambda x, weight, residual: F.linear(x, weight) + residual),
        (rms_norm, (x, gain), lambda x, gain: F.rms_norm(x, (576,), gain, 1e-6)),
        (add_rms_norm, (x, x.flip(0), gain), lambda x, y, gain: F.rms_norm(x + y, (576,), gain, 1e-6)),
    ):
        truth = op.reference(*(a.double() for a in args))
        y, true, plain = tree_leaves(op(*args))[0], tree_leaves(truth)[0], plainly(*args)
        assert (y.double() - true).norm() <= 2 * (plain.double() - true).norm()
    y, squares = linear_residual(x, weight, residual)
    true = y.double().square().sum(-1, keepdim=True)
    assert (squares - true).norm() <= 2 * (y.square().sum(-1, keepdim=True) - true).norm()


def unfused_linear(x: Tensor, weight: Tensor, gain: Tensor | None = None) -> Tensor:
    return F.linear(F.rms_norm(x, x.shape[-1:], gain, 1e-6), weight)


def unfused_glu(x: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None = None) -> Tensor:
    h = F.rms_norm(x, x.shape[-1:], gain, 1e-6)
    return F.silu(F.linear(h, gate)) * F.linear(h, up)


@pytest.mark.gpu
@pytest.mark.parametrize("tokens", [1, 30, 1000])
def test_gradients_on_a_gpu_are_as_accurate_as_unfused_code(tokens: int):
    """Every gradient errs at most twice as much as that of the same function in plain bf16 code."""
    torch.manual_seed(0)
    make = lambda *size: torch.randn(size, device="cuda").bfloat16()  # noqa: E731
    x, weight, up, gain, dy = make(tokens, 576), make(960, 576), make(960, 576), make(576), make(tokens, 960)
    for op, plainly, args in ((norm_linear, unfused_linear, (x, weight)), (norm_glu, unfused_glu, (x, weight, up))):
        fast, plain, wide = (
            [t.to(d).requires_grad_() for t in (*args, gain)] for d in (x.dtype, x.dtype, torch.double)
        )
        found = torch.autograd.grad(op(*fast), fast, dy)
        truth = torch.autograd.grad(op.reference(*wide), wide, dy.double())
        for y, p, t in zip(found, torch.autograd.grad(plainly(*plain), plain, dy), truth, strict=True):
            assert (y.double() - t).norm() <= 2 * (p.double() - t).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(
    ("tokens", "k", "n"), [(1, 77, 30), (1, 4104, 33), (3, 72, 50), (16, 1001, 130), (50, 520, 77)]
)
def test_products_of_any_size_on_a_gpu(tokens: int, k: int, n: int, dtype: torch.dtype):
    from taut.ops._triton.launch import Config, project

    torch.manual_seed(0)
    x, weight, up, bias, residual = (
        torch.randn(*size, device="cuda").to(dtype) for size in ((tokens, k), (n, k), (n, k), (n,), (tokens, n))
    )
    few = [Config(2, 0, 1024, 1, 1, 2), Config(16, 0, 512, 1, 1, 8, 128)]
    many = [Config(64, 16, 64, 4, 3, 4, 512), Config(64, 64, 128, 2, 4), Config(128, 64, 64, 1, 4)]
    args = (x.double(), weight.double(), None, bias.double(), 1e-5, residual.double())
    truth = norm_linear.reference(*args)
    plain = norm_linear(x, weight, None, bias, 1e-5, residual, impl="torch")
    error = lambda y: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
    for config in few if tokens == 1 else many:
        y = torch.full((tokens, n), float("nan"), dtype=dtype, device="cuda")
        assert error(project(x, weight, y, config, bias=bias, residual=residual, eps=1e-5)) <= 2 * error(plain)
        y = project(x, weight, y.fill_(float("nan")), config, up=up, act="silu", eps=1e-5)
        gated = norm_glu.reference(x.double(), weight.double(), up.double(), None, 1e-5)
        plainly = norm_glu(x, weight, up, None, 1e-5, impl="torch")
        assert (y.double() - gated).norm() <= 2 * (plainly.double() - gated).norm()


@pytest.mark.gpu
@pytest.mark.parametrize("mean", [0, 30])
@pytest.mark.parametrize(
    ("tokens", "k", "n"), [(1, 77, 30), (1, 4104, 33), (3, 72, 50), (16, 1001, 130), (50, 520, 77)]
)
def test_products_behind_a_layer_norm_on_a_gpu(tokens: int, k: int, n: int, mean: int):
    from taut.ops._triton.centred import project
    from taut.ops._triton.launch import Config

    torch.manual_seed(0)
    x, weight, bias, residual = (
        torch.randn(*size, device="cuda").bfloat16() for size in ((tokens, k), (n, k), (n,), (tokens, n))
    )
    args = x + mean, weight, bias, 1e-5, residual
    truth = layer_norm_linear.reference(*(a.double() if isinstance(a, Tensor) else a for a in args))
    plain = layer_norm_linear(*args, impl="torch")
    few = [Config(2, 0, 1024, 1, 1, 2), Config(16, 0, 512, 1, 1, 8, 128)]
    many = [Config(64, 16, 64, 4, 3, 4, 512), Config(64, 64, 128, 2, 4), Config(128, 64, 64, 1, 4)]
    for config, sums in itertools.product(few if tokens == 1 else many, (None, weight.float().sum(1))):
        y, again = (
            project(
                args[0], weight, torch.full_like(residual, torch.nan), config, sums=sums, bias=bias, residual=residual
            )
            for _ in range(2)
        )
        assert torch.equal(y, again)
        assert (y.double() - truth).norm() <= 2 * (plain.double() - truth).norm()


@pytest.mark.gpu
@pytest.mark.parametrize(("tokens", "d"), [(1, 576), (30, 2048), (1024, 2048), (1024, 8192), (40, 12288), (700, 16384)])
def test_the_gradient_of_a_norm_on_a_gpu(tokens: int, d: int):
    """Also with every number of programs and of rows on their way that the benchmark tries."""
    from taut.ops._triton.grads import Slopes, fitting, rms_norm_grad

    torch.manual_seed(0)
    dy, x, gain = (torch.randn(*size, device="cuda").bfloat16() for size in ((tokens, d), (tokens, d), (d,)))
    wide = [t.double().requires_grad_() for t in (x, gain)]
    truth = torch.autograd.grad(F.rms_norm(wide[0], (d,), wide[1], 1e-6), wide, dy.double())
    narrow = [t.clone().requires_grad_() for t in (x, gain)]
    plain = torch.autograd.grad(F.rms_norm(narrow[0], (d,), narrow[1], 1e-6), narrow, dy)
    for config in (fitting(d), *(fitting(d)._replace(programs=p, stages=s) for p in (1, 2) for s in (1, 2))):
        assert isinstance(config, Slopes)
        found = rms_norm_grad(dy, x, gain, torch.full_like(x, torch.nan), 1e-6, 132, config)
        for y, p, t in zip(found, plain, truth, strict=True):
            assert (y.double() - t).norm() <= 2 * (p.double() - t).norm()


@pytest.mark.gpu
def test_draws_on_a_gpu_are_those_of_float64():
    """float32 logits could part from float64's only where the best two noisy ones lie within rounding."""
    from taut.nn.sampling import sample_lm_head

    torch.manual_seed(0)
    h, weight = torch.randn(5, 64, device="cuda").bfloat16(), torch.randn(1003, 64, device="cuda").bfloat16() * 0.2
    heat, mask = torch.tensor([0, 1.0, 0.5, 2, 1], device="cuda"), torch.rand(1003, device="cuda") > 0.3
    for seed, k, eps in ((0, None, None), (2**64 - 5, None, 1e-5), (3, 5, None), (4, 60, 1e-5), (5, 700, None)):
        drawn = sample_lm_head(h, weight, heat, mask, seed, k, step=7, eps=eps)
        expected = sample_lm_head(h.double(), weight.double(), heat, mask, seed, k, step=7, eps=eps)
        assert torch.equal(drawn.ids, expected.ids)


@pytest.mark.gpu
@pytest.mark.parametrize("lengths", [[4096], [9000, 0, 1, 300], [4096] * 16], ids=lambda t: f"{len(t)} of {t[0]}")
def test_attention_repeats_itself(lengths: list[int]):
    torch.manual_seed(0)
    rows, q = len(lengths), torch.randn(len(lengths), 32, 128, device="cuda").bfloat16()
    k, v = torch.randn(2, rows, 8, max(lengths), 128, device="cuda").bfloat16()
    on_device = torch.tensor(lengths, device="cuda")
    truth = decode_attention.reference(q.double(), k.double(), v.double(), on_device)
    mask = (torch.arange(max(lengths), device="cuda") < on_device[:, None])[:, None, None]
    plain = F.scaled_dot_product_attention(q[:, :, None], k, v, mask, enable_gqa=True)[:, :, 0].nan_to_num()
    first, wrong = decode_attention(q, k, v, on_device, impl="triton"), torch.zeros((), device="cuda")
    assert (first.double() - truth).norm() <= 2 * (plain.double() - truth).norm()
    for _ in range(100):
        wrong += (decode_attention(q, k, v, on_device, impl="triton") != first).any()
    assert wrong == 0
