"""What the checks of norms say of speed, held on an H200: `benchmarks/norm_claims.py` with its bars. Noise is 2 %."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))
pytestmark = pytest.mark.gpu
NOISE = 0.98


@pytest.fixture(scope="module")
def claims() -> ModuleType:
    pytest.importorskip("triton")
    if "H200" not in torch.cuda.get_device_name():
        pytest.skip("the bars are those of an H200")
    return importlib.import_module("norm_claims")


def test_mx_norm_is_one_kernel_and_a_third_faster_than_two_compiled_ones(claims):
    assert all(row["gain"] >= 1.3 * NOISE for row in claims.mx_rows())


def test_eight_bit_rows_save_a_kernel(claims):
    assert all(row["gains"][0] >= 1.1 * NOISE for row in claims.fp8_rows())


def test_rms_norm_is_faster_than_layer_norm(claims):
    assert all(row["gain"] >= 1.05 * NOISE for row in claims.layer_rows())


@pytest.mark.parametrize("way", ["forward", "backward"])
def test_rms_norm_moves_as_many_bytes_a_second_as_liger_s(claims, way):
    pytest.importorskip("liger_kernel")
    for d, tokens in ((2048, 1024), (2048, 16384), (8192, 1024), (8192, 16384)):
        found = claims.rms_row(tokens, d, claims.liger())["us and TB/s"][way]
        assert found["taut"][1] >= 0.95 * found["Liger"][1], (d, tokens, found)


def test_a_product_behind_a_layer_norm_is_no_slower_than_compiled_code(claims):
    assert all(row["gain"] >= NOISE for row in claims.layer_norm_linear_rows())


def test_a_product_behind_an_rms_norm_is_no_slower_than_the_best_peer(claims):
    assert all(row["gain"] >= NOISE for row in claims.project_rows())
