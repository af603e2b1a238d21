"""int4 weights: what the inputs become before they meet the codes, and the paths of processors that can do less."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taut.ops._numba.nibbles import arrange
from taut.ops._numba.planes import (
    COPIES,
    GROUPS,
    INTEGER,
    LARGEST,
    LEAST,
    PAIRS,
    SCALES_AT,
    SIZE,
    SUMS_AT,
    VNNI,
    WIDE,
)
from taut.ops._weights import dequantize, quantize
from taut.ops.linear import linear

CASES = Path(__file__).with_name("nibble_cases.py")
bytes_only = pytest.mark.skipif(not INTEGER, reason="this processor has no instruction for products of bytes")


@pytest.mark.parametrize(
    "features",
    ["all", pytest.param("pairs", marks=pytest.mark.skipif(not VNNI, reason="all this processor has")), "plain"],
)
def test_products_are_as_accurate_as_plain_code(features: str, tmp_path: Path):
    where = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, CASES, features], capture_output=True, text=True, env=where, check=False)
    assert done.returncode == 0, done.stderr


def planes(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(the numbers of three bytes, by block of WIDE inputs, half, group and place; the sums; the scales)"""
    import numba

    to = torch.full((COPIES * len(x),), float("nan"))
    numba.njit(lambda source, target, count: arrange(source, target, count))(x.data_ptr(), to.data_ptr(), x.numel())
    raw = to.view(torch.int8).view(-1, 4 * COPIES * WIDE)
    copies = raw[:, :SUMS_AT].view(-1, 3, 2, COPIES, GROUPS, COPIES, 16 // COPIES).long().transpose(3, 4)
    assert torch.equal(copies, copies[..., :1, :].expand_as(copies))
    high, mid, low = copies[..., 0, :].flatten(-2).unbind(1)
    sums, scales = (raw[:, at : at + SIZE].contiguous() for at in (SUMS_AT, SCALES_AT))
    return 65536 * high + 256 * mid + low, sums.view(torch.int32), scales.view(torch.float32)


@bytes_only
@pytest.mark.parametrize("size", [1e-38, 1e-31, 1.0, 1e30])
def test_inputs_become_the_nearest_numbers_of_24_bits(size: float):
    x = torch.randn(6 * WIDE, generator=torch.Generator().manual_seed(1)) * size
    x[40:64] = 0
    found, sums, scales = planes(x)
    groups = x.view(-1, GROUPS, 2, 16)
    step = groups.abs().amax((2, 3)).clamp_min(LEAST).double() / LARGEST
    true = groups.double() / step[:, :, None, None]
    assert (found - true.transpose(1, 2)).abs().max() <= 0.5 + 2.0**-23 * LARGEST  # rounded twice
    assert (scales.view(-1, GROUPS, 4).double() / step[:, :, None] - 1).abs().max() <= 2.0**-23
    by_lane = found.view(-1, 2, GROUPS, 4, 4).sum((1, 4))
    by_lane = by_lane.sum(-1, keepdim=True).expand_as(by_lane) if PAIRS else by_lane
    assert torch.equal(sums.view(-1, GROUPS, 4).long(), -8 * by_lane)


@bytes_only
@pytest.mark.parametrize("wrong", [float("nan"), float("inf"), -float("inf")])
def test_what_is_no_number_reaches_every_product(wrong: float):
    codes, scale = quantize(torch.randn(6, 256), 4)
    x = torch.randn(2, 256)
    x[1, 77] = wrong
    got = linear(x, codes, scale=scale, impl="numba")
    assert got[0].isfinite().all()
    assert got[1].isnan().all()


def test_groups_of_zeros_and_of_numbers_hardly_above_zero():
    codes, scale = quantize(torch.randn(6, 64), 4)
    x = torch.zeros(2, 64)
    x[1] = torch.randn(64) * 1e-33
    got = linear(x, codes, scale=scale, impl="numba")
    assert not got[0].any()
    plain = x[1].double() @ dequantize(codes, scale, torch.float64).T
    assert (got[1].double() - plain).abs().max() <= 64 * 8 * float(scale.max()) * LEAST / LARGEST
