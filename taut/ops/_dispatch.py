"""Which product serves how many rows: thresholds measured on this machine, for shapes near the one at hand.

With few rows a product only reads its weight, and a matrix-vector kernel serves it best; with somewhat more a *flat*
product may, which pads the rows to a multiple of 8; with many the library's.

Source: Hong et al., FlashDecoding++: Faster Large Language Model Inference on GPUs, 2023, arXiv:2311.01282, sections 4
    and 5 (flat products padded to 8 rows; the table with its two points of inflection, M1 and M2).
Differs: M2 may equal M1, where padding never won. GPU kernels have a table of their own kind, `_triton/choice.py`.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.functional import linear as product
from torch.nn.functional import pad

from taut.machine import Progress, cache_file
from taut.ops._matvec import MOST_TOKENS, matvec
from taut.whole_file import write_text

TILE = 8

FEW_TOKENS = 4
"""Up to which the matrix-vector kernel is taken on a machine that has not been measured."""
HAS_ONEDNN = torch.backends.mkldnn.is_available()
ROWS = (1, 2, 3, 4, 6, 9, 12, 15, 20, 28)
"""Row counts that are measured."""
SHAPES = ((576, 576), (2048, 2048), (4096, 4096))
DTYPES = (torch.float32, torch.bfloat16)
CLEARLY = 0.97
"""Another product must take at most this share of the library's time to be taken in its place."""


@dataclass(frozen=True)
class Entry:
    """For a weight (n, k) of a dtype: a matrix-vector kernel serves up to `m1` rows, a padded product up to `m2`."""

    dtype: str
    n: int
    k: int
    m1: int
    m2: int
    microseconds: dict[str, list[float]]
    """By product, the least time seen at each of ROWS, as far as it takes so many."""


def choose(rows: int, n: int, k: int, dtype: torch.dtype) -> str | None:
    """`matvec`, `flat` or `library`: what the nearest measured shape takes; None where its dtype is not measured."""
    entry = _nearest(n, k, dtype)
    if entry is None:
        return None
    return "matvec" if rows <= entry.m1 else "flat" if rows <= entry.m2 else "library"


def _nearest(n: int, k: int, dtype: torch.dtype) -> Entry | None:
    near = [entry for entry in table(torch.get_num_threads()) if entry.dtype == _name(dtype)]
    distance = lambda e: abs(math.log(e.n / max(n, 1))) + abs(math.log(e.k / max(k, 1)))  # noqa: E731
    return min(near, key=distance, default=None)


# What `torch.compiler.assume_constant_result` does. To call it is to import Dynamo, which takes over a second.
_nearest.__dict__["_dynamo_marked_constant"] = True


def padded_rows(rows: int, tile: int = TILE) -> int:
    """Rows that a flat product (few rows, as in decoding) computes: a multiple of 8, the least a matrix unit takes,
    where general kernels pad to 64."""
    return tile * math.ceil(rows / tile)


def flat(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias, by the library's product of x with rows of zeros under it, `padded_rows` in all."""
    k = x.shape[-1]
    rows = x.numel() // k
    padded = pad(x.reshape(rows, k), (0, 0, 0, padded_rows(rows) - rows))
    return product(padded, weight, bias)[:rows].reshape(*x.shape[:-1], weight.shape[0])


@cache
def table(threads: int) -> tuple[Entry, ...]:
    """What `measure` found on this machine with as many threads; empty if it has not run."""
    try:
        return tuple(Entry(**row) for row in json.loads(_file().read_text()))
    except (OSError, ValueError, TypeError):
        return ()


def measure(
    progress: Progress = lambda _: None,
    shapes: Iterable[tuple[int, int]] = SHAPES,
    dtypes: Iterable[torch.dtype] = DTYPES,
    seconds: float = 0.05,
) -> tuple[Entry, ...]:
    """Time the three products on this machine with torch's current number of threads, and remember the thresholds.

    `seconds` is how long each is tried at each of ROWS. Measure on a quiet machine.
    """
    found = []
    for dtype in dtypes:
        for n, k in shapes:
            progress(f"products with a weight of {n} x {k} in {_name(dtype)}")
            times = _times(torch.randn(n, k).to(dtype), seconds)
            found.append(Entry(_name(dtype), n, k, *thresholds(times), times))
    _file().parent.mkdir(parents=True, exist_ok=True)
    write_text(_file(), json.dumps([asdict(entry) for entry in found], indent=1))
    table.cache_clear()
    return tuple(found)


def many(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias in float32, for many rows of x; by oneDNN where torch has it.

    For itself torch takes MKL, which uses AVX-512 on Intel's processors alone and is half as fast on AMD's.
    """
    if not HAS_ONEDNN:
        return product(x, weight, bias)
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def thresholds(times: dict[str, list[float]]) -> tuple[int, int]:
    """(M1, M2): the most of ROWS up to which the matrix-vector kernel is the fastest, then the flat product is."""
    columns = [{name: column[i] for name, column in times.items() if i < len(column)} for i in range(len(ROWS))]
    fastest = [_fastest(column) for column in columns]
    few = _leading(fastest, "matvec")
    some = few + _leading(fastest[few:], "flat")
    return (ROWS[few - 1] if few else 0), (ROWS[some - 1] if some else 0)


def _fastest(times: dict[str, float]) -> str:
    best = min(times, key=lambda name: times[name])
    return best if times[best] <= CLEARLY * times["library"] else "library"


def _leading(names: list[str], name: str) -> int:
    """How many stand in front that are `name`."""
    return next((i for i, other in enumerate(names) if other != name), len(names))


def _times(weight: Tensor, seconds: float) -> dict[str, list[float]]:
    """By product, the least microseconds at each of ROWS; the products take turns."""
    times: dict[str, list[float]] = {"matvec": [], "flat": [], "library": []}
    for rows in ROWS:
        x = torch.randn(rows, weight.shape[1]).to(weight.dtype)
        library = many if weight.dtype == torch.float32 and rows > FEW_TOKENS else product
        ways = {"flat": lambda x=x: flat(x, weight), "library": lambda x=x, library=library: library(x, weight)}
        if rows <= MOST_TOKENS:
            ways["matvec"] = lambda x=x: matvec(x, weight, None)
        for name, best in _least(ways, seconds).items():
            times[name].append(best)
    return times


def _least(ways: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, float]:
    for way in ways.values():
        way()
    best = dict.fromkeys(ways, math.inf)
    stop = time.perf_counter() + len(ways) * seconds
    while min(best.values()) == math.inf or time.perf_counter() < stop:
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            best[name] = min(best[name], 1e6 * (time.perf_counter() - start))
    return best


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _file() -> Path:
    return cache_file().with_suffix(".products.json")
