"""What a norm costs inside a layer, on a GPU: taut's chains with the norm against torch's with it and without it.

    python benchmarks/chains.py [--out benchmarks/results/h200/chains.json] [--tokens 1 16 64 256 1024 4096]

Three chains of a decoder: (residual add, norm, q/k/v, RoPE, cache append), (residual add, norm, gate/up, SwiGLU) and
(residual add, final norm, head, argmax), in the sizes of three models, bf16, gains folded into the weights everywhere.
The peers are eager torch (F.rms_norm and the vendor's product) and torch.compile of it, each with the norm and without.
Parity first, against float64; then every way is captured as a CUDA graph of many calls, each on a weight and a stream
of its own from memory, and the graphs are replayed in turn, in one run.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops import _gpu
from taut.ops._triton import choice
from taut.ops._triton.choice import Config
from taut.ops._triton.heads import rope_append
from taut.ops._triton.launch import argmax_lm_head, project
from taut.ops._triton.rows import add_norm_rows, add_rows, argmax_rows, glu_rows, stream
from taut.ops._triton.timing import copies_for, microseconds

EPS = 1e-6
TOKENS = (1, 16, 64, 256, 1024, 4096)
ROOM = 8192
"""Positions of the cache."""


class Model(NamedTuple):
    name: str
    width: int
    inner: int
    heads: int
    kv: int
    d: int
    vocabulary: int


MODELS = (
    Model("135M", 576, 1536, 9, 3, 64, 49_152),
    Model("1B", 2048, 8192, 32, 8, 64, 128_256),
    Model("8B", 4096, 14_336, 32, 8, 128, 128_256),
)


@dataclass
class Inputs:
    """What one call of a chain reads and writes beside its weight; `cos` and `sin` are those of all positions."""

    x: Tensor
    delta: Tensor
    cos: Tensor
    sin: Tensor
    positions: Tensor
    sequences: Tensor
    keys: Tensor
    values: Tensor
    model: Model


def summed(x: Tensor, delta: Tensor, norm: bool) -> tuple[Tensor, Tensor]:
    h = x + delta
    return h, F.rms_norm(h, h.shape[-1:], eps=EPS) if norm else h


def turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    half = x.shape[-1] // 2
    return x * cos + torch.cat((-x[..., half:], x[..., :half]), -1) * sin


def heads_plainly(given: Inputs, weight: Tensor, norm: bool) -> tuple[Tensor, ...]:
    m = given.model
    h, n = summed(given.x, given.delta, norm)
    q, k, v = F.linear(n, weight).unflatten(1, (-1, m.d)).split((m.heads, m.kv, m.kv), 1)
    # a model looks its angles up once for all layers
    cos, sin = given.cos[: len(h), None].to(h.dtype), given.sin[: len(h), None].to(h.dtype)
    given.keys[:, given.positions] = turned(k, cos, sin).transpose(0, 1)
    given.values[:, given.positions] = v.transpose(0, 1)
    return h, turned(q, cos, sin)


def glu_plainly(given: Inputs, weight: Tensor, norm: bool) -> tuple[Tensor, ...]:
    h, n = summed(given.x, given.delta, norm)
    gate, up = F.linear(n, weight).chunk(2, -1)
    return h, F.silu(gate) * up


def head_plainly(given: Inputs, weight: Tensor, norm: bool) -> tuple[Tensor, ...]:
    h, n = summed(given.x, given.delta, norm)
    return h, F.linear(n, weight).argmax(-1)


def heads_tautly(given: Inputs, weight: Tensor) -> tuple[Tensor, ...]:
    """Up to 64 tokens the sum and the norm belong to the product; above, RoPE carries the division out."""
    m, h = given.model, torch.empty_like(given.x)
    q = h.new_empty(len(h), m.heads, m.d)
    if _gpu.many(h):
        squares, qkv = add_rows(given.x, given.delta, h), F.linear(h, weight)
    else:
        squares, qkv = None, few(given, weight, h, "linear")
    places = given.cos, given.sin, given.positions, q, given.keys[None], given.values[None]
    rope_append(qkv, *places, sequences=given.sequences, squares=squares, width=m.width, eps=EPS)
    return h, q


def glu_tautly(given: Inputs, weight: Tensor) -> tuple[Tensor, ...]:
    """Up to 64 tokens one or two kernels; above, the activation carries the division out."""
    h, n = torch.empty_like(given.x), len(weight) // 2
    if not _gpu.many(h):
        return h, few(given, weight[:n], h, "glu", weight[n:])
    squares = add_rows(given.x, given.delta, h)
    both = F.linear(h, weight)
    return h, glu_rows(h, both[:, :n], both[:, n:], h.new_empty(len(h), n), EPS, "silu", squares)


def head_tautly(given: Inputs, weight: Tensor) -> tuple[Tensor, ...]:
    """The norm's scalar does not change which token is the likeliest."""
    h = torch.empty_like(given.x)
    stream(given.x, given.delta, total=h)
    return h, argmax_rows(F.linear(h, weight)) if _gpu.many(h) else argmax_lm_head(h, weight)


def few(given: Inputs, weight: Tensor, h: Tensor, kind: str, up: Tensor | None = None) -> Tensor:
    """Sum, norm and product of at most 64 tokens, by the kernel that was measured to be the fastest."""
    (n, k), device = weight.shape, choice.device_name(h.get_device())
    config = choice.choose(kind, len(h), n, k, device, summed=True)
    if isinstance(config, Config):
        y, act = h.new_empty(len(h), len(weight)), "identity" if up is None else "silu"
        return project(given.x, weight, y, config, up=up, act=act, eps=EPS, delta=given.delta, stream=h)
    n = add_norm_rows(given.x, given.delta, None, h, torch.empty_like(h), EPS)
    return F.linear(n, weight) if up is None else F.silu(F.linear(n, weight)) * F.linear(n, up)


CHAINS: dict[str, tuple[Callable, Callable]] = {
    "q/k/v": (heads_plainly, heads_tautly),
    "gate/up": (glu_plainly, glu_tautly),
    "head": (head_plainly, head_tautly),
}


def outputs(chain: str, m: Model) -> int:
    return {"q/k/v": (m.heads + 2 * m.kv) * m.d, "gate/up": 2 * m.inner, "head": m.vocabulary}[chain]


def inputs(m: Model, tokens: int, copies: int) -> list[Inputs]:
    angles = torch.outer(torch.arange(ROOM, device="cuda"), 10_000 ** -torch.arange(0, 1, 2 / m.d, device="cuda"))
    angles = torch.cat((angles, angles), -1)
    positions, sequences = torch.arange(tokens, device="cuda"), torch.zeros(tokens, device="cuda", dtype=torch.int32)
    make = lambda *size: torch.randn(*size, device="cuda", dtype=torch.bfloat16)  # noqa: E731
    keys, values = make(m.kv, ROOM, m.d), make(m.kv, ROOM, m.d)
    rest = angles.cos(), angles.sin(), positions, sequences, keys, values, m
    return [Inputs(make(tokens, m.width), make(tokens, m.width), *rest) for _ in range(copies)]


def weights(m: Model, chain: str, copies: int) -> list[Tensor]:
    n = outputs(chain, m)
    return [torch.randn(n, m.width, device="cuda", dtype=torch.bfloat16) / m.width**0.5 for _ in range(copies)]


def parity(chain: str, given: Inputs, weight: Tensor) -> tuple[float, float]:
    """taut's error and torch's against float64, of what the chain hands on and puts into the cache; for the head how
    far the chosen token's logit lies below the greatest one."""
    plainly, tautly = CHAINS[chain]
    few = replace(given, x=given.x[:256], delta=given.delta[:256], positions=given.positions[:256])
    few.sequences = given.sequences[:256]
    wide = {name: getattr(few, name).double() for name in ("x", "delta", "cos", "sin", "keys", "values")}
    truth_of = replace(few, **wide)
    found = []
    for way in (lambda: tautly(few, weight), lambda: plainly(few, weight, norm=True)):
        h, y = way()
        assert torch.equal(h, few.x + few.delta)
        found.append((y, few.keys.clone(), few.values.clone()))
    truth_of.x, truth_of.delta = (few.x + few.delta).double(), torch.zeros_like(truth_of.x)
    if chain == "head":
        logits = F.linear(summed(truth_of.x, truth_of.delta, True)[1], weight.double())
        regret = lambda y: float((logits.amax(-1) - logits.gather(1, y[:, None])[:, 0]).mean())  # noqa: E731
        return regret(found[0][0]), regret(found[1][0])
    _, y = plainly(truth_of, weight.double(), norm=True)
    truth = y, truth_of.keys, truth_of.values
    error = lambda parts: max(float((a.double() - t).norm() / t.norm()) for a, t in zip(parts, truth, strict=True))  # noqa: E731
    return error(found[0]), error(found[1])


def compiled(chain: str, norm: bool, mode: str | None) -> Callable:
    plainly = CHAINS[chain][0]

    def run(x, delta, cos, sin, positions, sequences, keys, values, weight, model):
        return plainly(Inputs(x, delta, cos, sin, positions, sequences, keys, values, model), weight, norm)

    fast = torch.compile(run, dynamic=False, mode=mode)

    def call(given: Inputs, weight: Tensor) -> tuple[Tensor, ...]:
        places = given.positions, given.sequences, given.keys, given.values
        return fast(given.x, given.delta, given.cos, given.sin, *places, weight, given.model)

    return call


def ways(chain: str, mode: str | None) -> Iterator[tuple[str, Callable]]:
    plainly, tautly = CHAINS[chain]
    yield "taut", tautly
    for norm, name in ((True, "with"), (False, "without")):
        yield f"eager {name}", lambda given, weight, norm=norm: plainly(given, weight, norm)
        yield f"compiled {name}", compiled(chain, norm, mode)


def row(m: Model, chain: str, tokens: int, mode: str | None) -> dict:
    torch._dynamo.reset()
    torch.manual_seed(0)
    copies = copies_for(2 * outputs(chain, m) * m.width + 4 * tokens * m.width, least=3, most=32)
    given, many = inputs(m, tokens, copies), weights(m, chain, copies)
    error, plain = parity(chain, given[0], many[0])
    assert error <= 2 * plain, (m.name, chain, tokens, error, plain)
    calls = dict(ways(chain, mode))
    runs = [lambda i, way=way: way(given[i], many[i]) for way in calls.values()]
    us = dict(zip(calls, (round(t, 2) for t in microseconds(runs, copies, 9)), strict=True))
    with_norm, without = (min(us[f"{way} {name}"] for way in ("eager", "compiled")) for name in ("with", "without"))
    return {
        "model": m.name,
        "chain": chain,
        "tokens": tokens,
        "us": us,
        "over_without_norm": round(us["taut"] / without, 3),
        "gain": round(with_norm / us["taut"], 3),
        "error": error,
        "plain_error": plain,
    }


def prepare(job: tuple[Model, str, int, str | None]) -> None:
    """Fill the compiler's caches, so that the timed process finds everything compiled."""
    m, chain, tokens, mode = job
    torch._dynamo.reset()
    (given,), (weight,) = inputs(m, tokens, 1), weights(m, chain, 1)
    for name, way in ways(chain, mode):
        if name.startswith("compiled"):
            way(given, weight)


def summary(rows: list[dict]) -> dict[str, float]:
    logs = [math.log(r["gain"]) for r in rows]
    worst = max(r["over_without_norm"] for r in rows)
    return {"gain": round(math.exp(sum(logs) / len(logs)), 3), "worst_over_without_norm": worst}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/chains.json"))
    parser.add_argument("--tokens", type=int, nargs="*", default=list(TOKENS))
    parser.add_argument("--models", nargs="*", default=[m.name for m in MODELS])
    parser.add_argument("--chains", nargs="*", default=list(CHAINS))
    parser.add_argument("--mode", default=None, help="of torch.compile, as max-autotune-no-cudagraphs")
    parser.add_argument("--workers", type=int, default=10, help="processes that compile beforehand; 0 for none")
    args = parser.parse_args()
    models = [m for m in MODELS if m.name in args.models]
    jobs = [(m, chain, tokens, args.mode) for chain in args.chains for tokens in args.tokens for m in models]
    if args.workers:
        with ProcessPoolExecutor(args.workers, get_context("spawn")) as pool:
            list(pool.map(prepare, jobs))
        print("compiled", flush=True)
    rows = []
    for job in jobs:
        rows.append(found := row(*job))
        times = "  ".join(f"{name} {us:.1f}" for name, us in found["us"].items())
        place = f"{found['chain']} {found['model']} x {found['tokens']}"
        print(f"{place:22} {times}  over {found['over_without_norm']} gain {found['gain']}", flush=True)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "mode": args.mode or "default"}
        args.out.write_text(json.dumps({**head, **summary(rows), "rows": rows}, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(summary(rows))


if __name__ == "__main__":
    main()
