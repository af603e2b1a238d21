"""mx_norm and norm_fp8: the ops against what they stand for, and their kernels in the interpreter and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from taut.formats.microscaling import MXFP8, Blocks
from taut.nn.norm.mx import MXNorm
from taut.ops.mx_norm import mx_norm
from taut.ops.norm_fp8 import norm_fp8
from taut.ops.rms_norm import rms_norm

CASES = Path(__file__).with_name("quantized_cases.py")


@pytest.mark.parametrize("estimate", ["blocks", "exact"])
def test_mx_norm_is_the_module(estimate):
    torch.manual_seed(0)
    x, module = torch.randn(50, 128), MXNorm(128, estimate=estimate)
    scales, codes = mx_norm(x, module.c.item(), module.eps, exact=estimate == "exact")
    wanted = module.quantized(x)
    assert torch.equal(scales, wanted.scales)
    assert torch.equal(codes, wanted.codes)
    assert torch.equal(MXFP8.dequantize(Blocks(scales, codes)), module(x))


def test_the_scale_of_a_row_takes_the_norm():
    """Quantizing the raw row and scaling is quantizing the norm's output: to a thousandth, mostly to the bit."""
    torch.manual_seed(0)
    x = torch.randn(500, 1024) * torch.exp2(torch.randint(-10, 10, (500, 1)).float())
    codes, scale = norm_fp8(x)
    y = rms_norm(x)
    top = y.abs().amax(-1, keepdim=True) / 448
    plain = (y / top).to(torch.float8_e4m3fn)
    assert (codes != plain.view(torch.uint8)).float().mean() < 1e-4
    got, wanted = codes.view(torch.float8_e4m3fn).float() * scale[:, None], plain.float() * top
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


def test_zeros_stay_zeros():
    codes, scale = norm_fp8(torch.zeros(3, 64))
    assert not codes.any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels(device: str):
    """On a GPU the 2x rule, and other codes only where the last bit of a factor decides. The interpreter's float8
    loses a carry, 8 steps."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("TRITON KERNELS NOT TESTED: Triton is not installed")
    where = dict(os.environ, TRITON_INTERPRET="1" if device == "cpu" else "0")
    done = subprocess.run([sys.executable, CASES, device], capture_output=True, text=True, env=where, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.rsplit(" ", 4) for line in done.stdout.splitlines()]
    assert len(found) == 9
    for name, error, plain, differing, steps in found:
        assert int(steps) in ((0, 1) if device == "cuda" else (0, 1, 8)), name
        assert float(differing) <= 0.05, name
        if device == "cuda":
            assert float(error) <= 2 * float(plain), name
            assert float(differing) <= 0.01, name
