"""Kernels that were written without a GPU at hand: compiled for Hopper, down to its machine code, on any machine."""

from __future__ import annotations

import importlib.util

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("TRITON KERNELS NOT TESTED: Triton is not installed", allow_module_level=True)

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from taut.ops._triton import centred, grads, lean

HOPPER = GPUTarget("cuda", 90, 32)
TYPES = {"partial": "*fp32", "sums": "*fp32", "found": "*fp32", "eps": "fp32"}
MATRICES = ("x", "weight", "weight_place", "gain", "dy", "dx", "dgain", "bias", "residual", "y")
COUNTS = ("tokens", "PARTS", "ahead", "batch", "heads", "page", "most_programs")
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


@pytest.mark.parametrize("paged", [False, True])
@pytest.mark.parametrize("batch", [1, 16])
@pytest.mark.parametrize(("d", "stages", "whole"), [(64, 3, False), (128, 4, True)])
def test_decode_attention(batch: int, paged: bool, d: int, stages: int, whole: bool):
    """Keys and values are on their way while the tensor cores work; a cache without pages is asked for ahead."""
    sizes = {"BATCH": batch, "GROUP": 4, "D": d, "KEYS": 64, "WHOLE": whole, "PDL": True}
    types = dict.fromkeys(("q", "k", "v"), "*bf16") | {"lengths": "*i32", "table": "*i32", "scale": "fp32"}
    types["scratch"] = "*fp32"
    constants = sizes | {"ROWS": 16, "WIDTH": d} | ({} if paged else {"table": None})
    made = compiled(lean.attend, constants, 4, stages, types)
    assert ("prefetch.global.L2" in made.asm["ptx"]) == (not paged)
    assert "cp.async" in made.asm["ptx"]
    joined = compiled(lean.merge, sizes | {"WIDTH": d // 4, "PARTS": 32}, 4, 1, types).asm["ptx"]
    places = [joined.index(f"griddepcontrol.{word}") for word in ("launch_dependents", "wait")]
    assert (places == sorted(places)) == (batch > 1)
