"""Kernels that were written without a GPU at hand: compiled for Hopper, down to its machine code, on any machine."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("TRITON KERNELS NOT TESTED: Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taut.ops._triton import centred, grads

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {"partial": "*fp32", "sums": "*fp32", "found": "*fp32", "eps": "fp32"}
MATRICES = ("x", "weight", "weight_place", "gain", "dy", "dx", "dgain", "bias", "residual", "y")
COUNTS = ("tokens", "PARTS", "ahead")
"""Whole numbers that need not be multiples of 16, as widths and strides are here."""


def compiled(kernel, constants: dict, warps: int = 4, stages: int = 1, types: dict | None = None):
    """A kernel for bfloat16 matrices whose rows begin at multiples of 16 bytes."""
    types = TYPES | dict.fromkeys(MATRICES, "*bf16") | (types or {})
    names = kernel.arg_names
    signature = {n: "constexpr" if n in constants else types.get(n, "i32") for n in names}
    values = {(names.index(n),): value for n, value in constants.items()}
    even = [n for n, kind in signature.items() if kind[0] == "*" or (kind == "i32" and n not in COUNTS)]
    source = ASTSource(kernel, signature, values, {(names.index(n),): [["tt.divisibility", 16]] for n in even})
    return triton.compile(source, target=HOPPER, options={"num_warps": warps, "num_stages": stages, "launch_pdl": True})


@pytest.mark.parametrize("k", [576, 2048, 8192, 16384])
def test_the_gradient_of_a_norm(k: int):
    """Its next rows are fetched meanwhile, and a multiprocessor holds as many programs as are meant to share it."""
    config = grads.fitting(k)
    sizes = {"BK": triton.next_power_of_2(k), "STAGES": config.stages, "PDL": True}
    made = compiled(grads.norm_slopes, sizes, config.warps)
    assert "cp.async" in made.asm["ptx"]
    assert config.programs * made.metadata.shared <= 227 * 1024
    assert compiled(grads.gain_slopes, {"BP": 64, "BN": 32, "PDL": True}).asm["cubin"]


@pytest.mark.parametrize("without", [(), ("sums",), ("bias", "residual")], ids=str)
def test_a_token_behind_a_layer_norm(without: tuple[str, ...]):
    constants = {"BN": 4, "BK": 512, "EVEN": True, "STAGES": 1, "PDL": True} | dict.fromkeys(without)
    assert compiled(centred.matvec, constants).asm["cubin"]


@pytest.mark.parametrize(("k", "warps"), [(768, 2), (4096, 8), (32768, 32)])
def test_the_statistics_of_a_row_before_a_layer_norm_s_product(k: int, warps: int):
    assert compiled(centred.statistics, {"BK": triton.next_power_of_2(k), "PDL": True}, warps).asm["cubin"]


@pytest.mark.parametrize("split", [1, 4])
@pytest.mark.parametrize("tma", [True, False])
def test_tokens_behind_a_layer_norm(split: int, tma: bool):
    """The product is the tensor cores' and its tiles are on their way while they work."""
    constants = {"BN": 64, "BT": 16, "BK": 64, "SPLIT": split, "TMA": tma, "PDL": True}
    types = {"x": "tensordesc<bf16[16, 64]>", "weight": "tensordesc<bf16[64, 64]>"} if tma else {}
    made = compiled(centred.product, constants | ({} if split > 1 else {"partial": None}), 4, 3, types)
    assert "wgmma.mma" in made.asm["ptx"]
    assert made.metadata.shared > 2 * (64 + 16) * 64 * 2
    if split > 1:
        assert compiled(centred.finish, {"SPLIT": split, "BN": 512, "PDL": True}).asm["cubin"]
