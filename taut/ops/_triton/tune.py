"""Measure which configuration serves which product on this GPU, and write the table that `choice` reads.

python -m taut.ops._triton.tune [--out FILE] [--shapes K,N[g] ...] [--tokens N ...] takes some minutes. What is not
measured is taken over from the table in use.
"""

from __future__ import annotations

import argparse
import itertools
import json
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from taut.ops._triton.choice import BUCKETS, made_here, table
from taut.ops._triton.launch import Config, project
from taut.ops._triton.timing import copies_for, microseconds

MARGIN = 0.98
"""A kernel is chosen where it takes less than this share of the vendor's time."""


class Shape(NamedTuple):
    k: int
    n: int
    kind: str = "linear"


SHAPES = (
    *(Shape(576, 960), Shape(2048, 2560), Shape(4096, 6144), Shape(4096, 28672)),
    *(Shape(576, 576), Shape(2048, 2048), Shape(4096, 4096)),
    *(Shape(1536, 576), Shape(8192, 2048), Shape(14336, 4096)),
    *(Shape(576, 1536, "glu"), Shape(2048, 8192, "glu"), Shape(4096, 14336, "glu")),
)


def buckets(shape: Shape) -> tuple[int, ...]:
    """Token counts worth measuring: of many tokens a gated pair is always the vendor's."""
    return BUCKETS if shape.kind == "linear" else BUCKETS[:3]


def configs(shape: Shape, tokens: int) -> Iterator[Config]:
    """What is worth trying."""
    if tokens == 1:
        for outputs, inputs, warps in itertools.product((1, 2, 4, 8, 16), (512, 1024, 2048, 4096), (2, 4, 8)):
            held = outputs * inputs * (2 if shape.kind == "glu" else 1) // (32 * warps)
            if 8 <= held <= 128 and inputs < 2 * shape.k:
                yield Config(outputs, 0, inputs, 1, 1, warps)
        return
    weights, columns = 2 if shape.kind == "glu" else 1, min(tokens, 64)
    for outputs, inputs, split in itertools.product((16, 32, 64, 128), (64, 128, 256), (1, 2, 4, 8)):
        programs, steps = -(-shape.n // outputs) * split, -(-shape.k // inputs) // split
        stage = (weights * outputs + columns) * inputs * 2
        if tokens > columns and split > 2:
            continue
        if not (min(48, shape.n // 32) <= programs <= 1800 and steps >= 1) or outputs < columns:
            continue  # 32 outputs by 64 tokens, one product on each kind of matrix instruction, did not repeat itself
        for stages in (3, 4, 6, 8):
            if stages * stage <= 200 * 1024 and stages <= steps + 1 and stages * stage >= 24 * 1024:
                yield Config(outputs, columns, inputs, split, stages, 4)


def inputs(shape: Shape, tokens: int, copies: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Tensor, list, list]:
    """x [tokens, k], and copies of the weight and of the second one of a GLU ([None] where there is none)."""
    torch.manual_seed(0)
    make = lambda *size: torch.randn(*size, device="cuda", dtype=dtype)  # noqa: E731
    weights = [make(shape.n, shape.k) / shape.k**0.5 for _ in range(copies)]
    ups = [make(shape.n, shape.k) / shape.k**0.5 for _ in range(copies)] if shape.kind == "glu" else [None] * copies
    return make(tokens, shape.k), weights, ups


def vendor(x: Tensor, weight: Tensor, up: Tensor | None, eps: float = 1e-6) -> Tensor:
    """torch's norm and the vendor's products."""
    h = F.rms_norm(x, x.shape[-1:], eps=eps)
    return F.linear(h, weight) if up is None else F.silu(F.linear(h, weight)) * F.linear(h, up)


def fused(x: Tensor, weight: Tensor, up: Tensor | None, config: Config, eps: float = 1e-6) -> Tensor:
    act = "identity" if up is None else "silu"
    return project(x, weight, x.new_empty(len(x), len(weight)), config, up=up, act=act, eps=eps)


def of_sum(x: Tensor, weight: Tensor, up: Tensor | None, config: Config, eps: float = 1e-6) -> Tensor:
    """The same of x + x, which is written too."""
    act, y = "identity" if up is None else "silu", x.new_empty(len(x), len(weight))
    return project(x, weight, y, config, up=up, act=act, eps=eps, delta=x, stream=torch.empty_like(x))


def compile_all(cases: list[tuple[Shape, int]], workers: int) -> None:
    """Fill Triton's cache with every kernel to be tried, in as many processes."""
    jobs = [(shape, tokens, c) for shape, tokens in cases for c in configs(shape, tokens)]
    unlike = {(shape.kind, min(tokens, 2), c): (shape, tokens, c) for shape, tokens, c in jobs}
    jobs = list(unlike.values())
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_compile, [jobs[i::workers] for i in range(workers)]))


def _compile(jobs: list[tuple[Shape, int, Config]]) -> None:
    for shape, tokens, config in jobs:
        x, (weight,), (up,) = inputs(Shape(1024, 1024, shape.kind), tokens, 1)
        with suppress(triton.runtime.errors.OutOfResources):
            fused(x, weight, up, config)
            if tokens == 1:
                of_sum(x, weight, up, config)


def errors_of(shape: Shape, tokens: int, tried: list[Config]) -> tuple[dict[Config, float], float]:
    """The relative error of every configuration that runs and gives the same bits twice, and the vendor's."""
    x, (weight,), (up,) = inputs(shape, tokens, 1)
    wide = [None if t is None else t.double() for t in (x, weight, up)]
    truth = vendor(*wide)
    error = lambda y: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
    found = {}
    for config in tried:
        try:
            first, second = (fused(x, weight, up, config) for _ in range(2))
        except triton.runtime.errors.OutOfResources:
            continue
        if torch.equal(first, second):
            found[config] = error(first)
        else:
            print(f"NOT DETERMINISTIC {shape} {tokens} {config}")
    return found, error(vendor(x, weight, up))


def measure(shape: Shape, tokens: int, keep: int = 4) -> dict:
    """One row of the table; `tried` lists the fastest configurations with their times."""
    found, plain = errors_of(shape, tokens, list(configs(shape, tokens)))
    wrong = [config for config, error in found.items() if not error <= 2 * plain]
    if wrong:
        print(f"WRONG {shape} {tokens}: {[(c, found[c]) for c in wrong[:4]]} against {plain}")
    right = [config for config in found if config not in wrong]
    weights = 2 if shape.kind == "glu" else 1
    nbytes = shape.n * shape.k * 2 * weights
    copies = copies_for(nbytes, least=4, room=128 * 2**20, most=64)
    x, many, ups = inputs(shape, tokens, copies)
    call = lambda config: lambda i: fused(x, many[i], ups[i], config)  # noqa: E731
    quick = {c: microseconds([call(c)], copies, 5)[0] for c in right}
    ranked = sorted(quick, key=lambda c: quick[c])
    for c in ranked[:keep]:
        for ahead in (128, 512, 2048):
            if ahead < 2 * shape.k:
                eager = c._replace(ahead=ahead)
                quick[eager] = microseconds([call(eager)], copies, 5)[0]
    alone = ranked[0]._replace(ahead=-1)
    quick[alone] = microseconds([call(alone)], copies, 5)[0]
    best = sorted(quick, key=lambda c: quick[c])[:keep]
    calls = [call(c) for c in best]
    product = lambda i: (F.linear(x, many[i]), None if ups[i] is None else F.linear(x, ups[i]))  # noqa: E731
    *times, vendors, plainly = microseconds([*calls, lambda i: vendor(x, many[i], ups[i]), product], copies, 15)
    us, config = min(zip(times, best, strict=True), key=lambda pair: pair[0])
    row = {
        **shape._asdict(),
        "tokens": tokens,
        "config": list(config) if us < MARGIN * vendors else None,
        "us": round(us, 3),
        "vendor_us": round(vendors, 3),
        "product_us": round(plainly, 3),
    }
    if tokens > 1:
        return row
    return row | {"summed": list(fastest_of_sum(x, many, ups, [*right, *best]))}


def fastest_of_sum(x: Tensor, many: list, ups: list, tried: list[Config], keep: int = 4) -> Config:
    """The fastest for an input that is summed on the way: the sum costs each program, so that fewer pay."""
    call = lambda config: lambda i: of_sum(x, many[i], ups[i], config)  # noqa: E731
    quick = {c: microseconds([call(c)], len(many), 5)[0] for c in tried}
    best = sorted(quick, key=lambda c: quick[c])[:keep]
    times = microseconds([call(c) for c in best], len(many), 15)
    print(f"  of a sum: {[(tuple(c), round(us, 2)) for c, us in zip(best, times, strict=True)]}", flush=True)
    return min(zip(times, best, strict=True), key=lambda pair: pair[0])[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=None)
    parser.add_argument("--shapes", nargs="*", default=None, help="K,N or K,Ng for a gated pair")
    parser.add_argument("--tokens", type=int, nargs="*", default=list(BUCKETS))
    parser.add_argument("--workers", type=int, default=14)
    args = parser.parse_args()
    device = torch.cuda.get_device_name()
    shapes = [_shape(text) for text in args.shapes] if args.shapes else list(SHAPES)
    cases = [(shape, tokens) for shape in shapes for tokens in buckets(shape) if tokens in args.tokens]
    compile_all(cases, args.workers)
    rows = {_place(row): row for row in table(device)}
    out = args.out or made_here(device)
    out.parent.mkdir(parents=True, exist_ok=True)
    for shape, tokens in cases:
        row = measure(shape, tokens)
        rows[_place(row)] = row
        chosen = "vendor" if row["config"] is None else tuple(row["config"])
        times = f"{row['us']:8.2f} us; vendor {row['vendor_us']:8.2f}, product alone {row['product_us']:8.2f}"
        print(f"{shape.kind} ({shape.k}, {shape.n}) x {tokens:3}: {times}  {chosen}", flush=True)
        out.write_text(written(device, list(rows.values())))


def written(device: str, rows: list[dict]) -> str:
    """The table as JSON, a row a line."""
    head = json.dumps({"device": device, "torch": torch.__version__, "triton": triton.__version__})
    lines = ",\n".join(json.dumps(row) for row in rows)
    return f'{head[:-1]}, "measured": [\n{lines}\n]}}\n'


def _place(row: dict) -> tuple:
    return row["kind"], row["k"], row["n"], row["tokens"]


def _shape(text: str) -> Shape:
    k, n = text.removesuffix("g").split(",")
    return Shape(int(k), int(n), "glu" if text.endswith("g") else "linear")


if __name__ == "__main__":
    main()
