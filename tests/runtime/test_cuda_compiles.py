"""The kernels of the decode step, compiled for Hopper down to its machine code, on any machine."""

from __future__ import annotations

import importlib.util
import re
import subprocess
from math import prod
from pathlib import Path

import pytest
import torch

if importlib.util.find_spec("triton") is None:
    pytest.skip("KERNELS OF THE DECODE STEP NOT TESTED: Triton is not installed", allow_module_level=True)

import triton
from test_runner import of
from triton.backends.compiler import GPUTarget
from triton.runtime.driver import driver
from triton.runtime.jit import JITFunction

from taut.runtime._triton.kernels import NEAR, ONE_ROW
from taut.runtime._triton.launch import After, one
from taut.runtime.cuda import CudaRunner
from taut.runtime.steps import Attend, Embed, Glu, Linear, Norm, Program, Rotary, View, Weight

REGISTERS = 2**16
"""Of a multiprocessor."""


class Hopper:
    """What Triton asks of a GPU before it compiles."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int | None = None) -> int:
        return 0

    def get_active_torch_device(self) -> torch.device:
        return torch.device("cpu")


@pytest.fixture
def launches(monkeypatch) -> list:
    """(name, grid, compiled kernel) of every launch, none of which is run."""
    found: list = []

    def caught(self, grid):
        return lambda *args, **options: found.append((self.__name__, grid, self.warmup(*args, grid=grid, **options)))

    monkeypatch.setattr(JITFunction, "__getitem__", caught)
    monkeypatch.setattr(driver, "_active", Hopper())
    return found


def layer(heads: int, kv_heads: int, d: int, dtype: torch.dtype = torch.bfloat16, **options) -> Program:
    """One of a Llama, 576 wide."""
    q, kv, width, inner = heads * d, kv_heads * d, 576, 1536
    matrix = lambda n, k: Weight(torch.zeros(n, k, dtype=dtype))  # noqa: E731
    widths = {"x": width, "qkv": q + 2 * kv, "a": q, "o": width, "g": inner, "y": width}
    views = View("qkv", 0, q), View("qkv", q, q + kv), View("qkv", q + kv, q + 2 * kv)
    angles, norm = torch.zeros(1024, d // 2), Norm(1e-5)
    steps = (
        Embed("x", matrix(1000, width)),
        Linear("qkv", of("x", widths), matrix(q + 2 * kv, width), norm=norm),
        Attend("a", *views, 0, heads, kv_heads, d, d, d**-0.5, Rotary(angles, angles), **options),
        Linear("o", of("a", widths), matrix(width, q), residual=of("x", widths)),
        Glu("g", of("o", widths), matrix(inner, width), matrix(inner, width), "silu", norm=norm),
        Linear("y", of("g", widths), matrix(width, inner), residual=of("o", widths)),
        Linear("logits", of("y", widths), matrix(1000, width), norm=norm),
    )
    return Program(steps, widths | {"logits": 1000}, "logits", ((kv_heads, d, d),), 1024)


def played(made: Program, rows: int, launches: list, folder: Path) -> dict[str, list[tuple[int, int, int]]]:
    """The launches of a step of so many rows, by kernel: (programs, registers of each, bytes that a thread spills)."""
    runner = CudaRunner(made, rows, device="cpu", capture=False)
    runner.kernels.pdl, runner.kernels.processors = True, 132
    runner.kernels.play(rows, rows == 1)
    runner.kernels.draw(rows, None, runner.heat)
    found: dict[str, list] = {}
    for name, grid, kernel in launches:
        found.setdefault(name, []).append((prod(grid), *used(kernel, folder / "kernel.cubin")))
    return found


def used(kernel, file: Path) -> tuple[int, int]:
    file.write_bytes(kernel.asm["cubin"])
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    said = subprocess.run([tool, "-res-usage", file], capture_output=True, text=True, check=True)
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", said.stdout + said.stderr).groups()
    return 32 * kernel.metadata.num_warps * int(registers), int(stack)


def test_a_row_behind_few_keys(launches, tmp_path):
    """Five kernels a layer. Attention and what stands around it are small enough to wait beside each other."""
    found = played(layer(9, 3, 64), 1, launches, tmp_path)
    assert {name: len(made) for name, made in found.items()} == {"embed": 1, "one": 5, "stretch": 1, "draw": 1}
    assert found["stretch"][0][0] == 9 * NEAR.splits
    assert all(3 * registers <= REGISTERS and not spilled for made in found.values() for _, registers, spilled in made)


@pytest.mark.parametrize(("d", "dtype"), [(64, torch.bfloat16), (128, torch.bfloat16), (64, torch.float32)], ids=str)
def test_a_row_behind_many_keys(launches, tmp_path, d: int, dtype: torch.dtype):
    found = played(layer(32, 8, d, dtype), 1, launches, tmp_path)
    programs, registers, spilled = found["attend"][0]
    assert programs == 8 * 16
    assert 2 * registers <= REGISTERS
    assert not spilled


def test_rows(launches, tmp_path):
    found = played(layer(9, 3, 64, softcap=30.0), 16, launches, tmp_path)
    assert set(found) == {"embed", "many", "join", "attend", "draw"}
    assert not any(spilled for made in found.values() for _, _, spilled in made)


@pytest.mark.parametrize("centred", [False, True])
@pytest.mark.parametrize(("n", "k", "gated"), ONE_ROW)
def test_measured_tiles_have_room_for_a_norm_s_own_gain_and_bias(launches, tmp_path, n, k, gated, centred: bool):
    """They are held beside the weights, from before the wait on."""
    made = lambda *size: torch.empty(size, dtype=torch.bfloat16)  # noqa: E731
    norm = Norm(1e-5, torch.ones(k), torch.zeros(k) if centred else None, centred)
    up = made(n, k) if gated else None
    one(made(1, k), made(n, k), up, made(1, n), norm, After(activation="silu"), ONE_ROW[n, k, gated], True)
    assert [used(kernel, tmp_path / "kernel.cubin")[1] for _, _, kernel in launches] == [0]
