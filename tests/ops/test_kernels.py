"""How kernels are kept and called."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np

import taut
from taut.ops._numba.kernels import invoke, jit, kernel, record
from taut.ops._numba.scalar import array

EVERY = """
import sys
import torch
from taut.ops._laid import compressed
from taut.ops._numba.formats import PRODUCTS
from taut.runtime._numba import dense, place
from taut.runtime._numba.interpreter import run
steps = dense.linear, dense.glu, dense.normalize, dense.combine, place.embed, place.turn, place.attend
kinds = *PRODUCTS.values(), *place.APPEND.values(), *place.ATTEND_CHUNK.values()
for kernel in (*steps, place.attend_early, place.merge_chunks, run, *kinds):
    kernel()
if laid := compressed(torch.ones(16, 64, dtype=torch.bfloat16)):
    laid.write(torch.empty(laid.nbytes, dtype=torch.uint8))
print("numba.np.arrayobj" in sys.modules)
"""
PAIR = np.dtype([("count", np.int64), ("scale", np.float64)])
HITS = "from taut.ops._numba.formats import share_of as f; f(100, 1, 3); print(sum(f.stats.cache_hits.values()))"


@kernel
def scaled(pair, x, n):
    """What n float64 at x become."""
    p = record(pair, PAIR)
    values = array(x, n, np.float64(0))
    for i in range(n):
        values[i] *= p.scale


@jit
def through(address, pair, x, n):
    invoke(address, (pair, x, n))


def test_a_kernel_is_called_by_its_address():
    pair, x = np.array([(3, 0.5)], PAIR), np.arange(4.0)
    through(scaled(), pair.ctypes.data, x.ctypes.data, 3)
    assert x.tolist() == [0, 0.5, 1, 3]
    assert scaled() == scaled()


def test_what_is_compiled_is_kept_until_any_source_changes(tmp_path: Path):
    """numba itself would go on with what a function was made of, as long as its own file is the same."""
    copy = tmp_path / "taut"
    shutil.copytree(Path(taut.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__", "model"))

    def hits() -> int:
        command = [sys.executable, "-c", HITS]
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, check=True)
        return int(done.stdout)

    assert [hits(), hits()] == [0, 1]
    (copy / "ops" / "_numba" / "scalar.py").open("a").write("\n")
    assert hits() == 0


def test_what_is_kept_loads_without_what_compiles():
    """A kernel that made arrays would end the second process."""
    command = [sys.executable, "-c", EVERY]
    said = [subprocess.run(command, capture_output=True, text=True, check=True).stdout for _ in range(2)]
    assert said[1] == "False\n"
