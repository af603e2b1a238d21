"""mx_norm and norm_fp8: the ops against what they stand for, and their kernels in the interpreter and on a GPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from twice import rounded_as_accurately

from taut.formats.microscaling import MXFP8, Blocks
from taut.formats.minifloat import E4M3
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
    """Quantizing the raw row and scaling is quantizing the norm's output: every code is a nearest one for either."""
    torch.manual_seed(0)
    x = torch.randn(500, 1024) * torch.exp2(torch.randint(-10, 10, (500, 1)).float())
    codes, scale = norm_fp8(x)
    y, true = rms_norm(x), rms_norm.reference(x.double())
    top = y.abs().amax(-1, keepdim=True) / 448
    plain = (y / top).to(torch.float8_e4m3fn)
    quotients = true / true.abs().amax(-1, keepdim=True) * 448
    got = codes.view(torch.float8_e4m3fn)
    assert rounded_as_accurately(got, E4M3.round(quotients), quotients, y / top)
    got, wanted = got.float() * scale[:, None], plain.float() * top
    assert (got - wanted).norm() <= 1e-3 * wanted.norm()


def test_zeros_stay_zeros():
    codes, scale = norm_fp8(torch.zeros(3, 64))
    assert not codes.any()
    assert scale.isfinite().all()


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_kernels(device: str):
    """The 2x rule, for codes on the error that their quotients must have had."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("TRITON KERNELS NOT TESTED: Triton is not installed")
    where = dict(os.environ, TRITON_INTERPRET="1" if device == "cpu" else "0")
    done = subprocess.run([sys.executable, CASES, device], capture_output=True, text=True, env=where, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    found = [line.rsplit(" ", 2) for line in done.stdout.splitlines()]
    assert len(found) == 12
    for name, error, plain in found:
        assert float(error) <= 2 * float(plain) + torch.finfo(torch.float32).eps, name
