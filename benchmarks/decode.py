"""Decoding on a GPU: taut's engine against transformers with a static cache, compiled and eager, in one run.

    python benchmarks/decode.py [--out benchmarks/results/h200/decode.json] [--only 135M 1B 8B] [--quick] [--no-peers]

Models of the shapes of SmolLM2-135M, Llama-3.2-1B and Llama-3.1-8B with random weights in bfloat16. Parity first: over
32 teacher-forced steps behind 480 tokens the logits are at most twice as far from float64 as transformers' own are.
Every way replays a CUDA graph from token to token, with the argmax inside; a time is the median of five rounds of 32
tokens behind the context, ways in turn. For the times the cache holds random numbers.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

import taut
from taut import machine
from taut.ops._triton.timing import graph
from taut.parity import in_float64
from taut.runtime.cuda import CudaRunner
from taut.runtime.engine import Engine
from taut.runtime.sampling import Sampling
from taut.runtime.steps import Program

SHAPES: dict[str, dict[str, Any]] = {
    "135M": {"hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9}
    | {"num_key_value_heads": 3, "head_dim": 64, "vocab_size": 49152, "tie_word_embeddings": True},
    "1B": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 64, "vocab_size": 128256, "tie_word_embeddings": True},
    "8B": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    | {"num_key_value_heads": 8, "head_dim": 128, "vocab_size": 128256, "tie_word_embeddings": False},
}
DEVICE = "cuda"
PROMPT, STEPS, FORCED = 512, 64, 32
ROOM = 2 * STEPS
"""Positions behind the context, into which the timed steps go."""
CASES = [(1, PROMPT), (16, PROMPT), (64, PROMPT), (1, 8192), (1, 32768), (16, 8192)]
GREEDY = Sampling()


class Way(NamedTuple):
    """A step from tokens to tokens, and what puts the tokens behind the context again."""

    step: Callable[[], None]
    again: Callable[[], object]


def build(name: str) -> Any:
    """The model on the GPU in bfloat16; as a trained one, it keeps the scale of its activations."""
    import transformers

    config = transformers.LlamaConfig(**SHAPES[name], max_position_embeddings=40960)
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with torch.device(DEVICE):
            return transformers.LlamaForCausalLM(config).eval()
    finally:
        torch.set_default_dtype(default)


@torch.no_grad()
def parity(model: Any, engine: Engine) -> dict[str, float]:
    """Errors of taut and of transformers against the same model in float64."""
    vocabulary = model.config.vocab_size
    ids = torch.randint(vocabulary, (PROMPT,), generator=torch.Generator().manual_seed(1))
    start = PROMPT - FORCED
    engine.reset()
    rows = [engine.prefill(ids[:start]).clone()]
    rows += [engine.decode([token])[0].clone() for token in ids[start : PROMPT - 1].tolist()]
    found = torch.stack(rows).double().cpu()
    own = model(input_ids=ids[None].to(DEVICE), use_cache=False).logits[0, start - 1 : PROMPT - 1].double().cpu()
    exact = in_float64(model, ids[:start].tolist(), ids[start:].tolist())
    errors = {way: float((y - exact).norm() / exact.norm()) for way, y in (("taut", found), ("transformers", own))}
    assert errors["taut"] <= 2 * errors["transformers"], errors
    return errors


def ours(engine: Engine, batch: int, context: int) -> Way:
    """A step of taut's from tokens to tokens, from a cache of random numbers."""
    runner: Any = engine.runner
    assert isinstance(runner, CudaRunner)
    rows = torch.full((batch,), 7), torch.full((batch,), context), torch.arange(batch)
    return Way(lambda: runner.play(batch, GREEDY), lambda: runner.put(*rows))


def theirs(model: Any, batch: int, context: int, compiled: bool) -> Way:
    """A step of transformers' over a static cache: compiled with graphs, or its eager kernels in a graph."""
    from transformers import StaticCache

    cache: Any = StaticCache(model.config, max_cache_len=context + ROOM)
    token = torch.full((batch, 1), 7, device=DEVICE)
    place = torch.full((1, 1), context, device=DEVICE)

    def forward(token: Tensor, place: Tensor) -> Tensor:
        out = model(input_ids=token, past_key_values=cache, use_cache=True, position_ids=place.expand(batch, 1))
        return out.logits[:, -1].argmax(-1, keepdim=True)

    run = torch.compile(forward, mode="reduce-overhead", dynamic=False) if compiled else forward

    @torch.no_grad()
    def step() -> None:
        torch.compiler.cudagraph_mark_step_begin()
        token.copy_(run(token, place))
        place.add_(1)

    def again() -> None:
        """In place: a graph reads the tensors where they are, and does not keep them."""
        token.fill_(7)
        place.fill_(context)
        for layer in cache.layers:
            if isinstance(layer.cumulative_length, Tensor):
                layer.cumulative_length.fill_(context)
            else:
                layer.cumulative_length = context

    with torch.no_grad():
        forward(token, place)  # makes the caches
    for layer in cache.layers:
        layer.keys.normal_()
        layer.values.normal_()
    again()
    for _ in range(4):
        step()
    return Way(step if compiled else graph(lambda _: step(), 1).replay, again)


def milliseconds(ways: dict[str, Way], rounds: int = 5) -> dict[str, float]:
    """The median time of a step of each way, ways in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for number in range(rounds + 1):
        for name, way in ways.items():
            steps = STEPS // 2 if number else 4
            way.again()
            way.step()  # the GPU is at work when the first event is recorded
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(steps):
                way.step()
            end.record()
            end.synchronize()
            if number:
                times[name].append(start.elapsed_time(end) / steps)
    return {name: statistics.median(seen) for name, seen in times.items()}


def row(name: str, model: Any, program: Program, batch: int, context: int, peers: dict[str, bool]) -> dict[str, Any]:
    """Times of one batch and context; a peer that cannot run says why."""
    torch._dynamo.reset()  # what an earlier row compiled goes, with its memory
    engine = Engine(replace(program, max_length=context + ROOM), batch, device=DEVICE)
    for pair in engine.runner.caches:
        for cache in pair:
            cache.normal_()
    ways, failed = {"taut": ours(engine, batch, context)}, {}
    for peer, compiled in peers.items():
        began = time.perf_counter()
        try:
            ways[peer] = theirs(model, batch, context, compiled)
            print(f"  {peer} ready in {time.perf_counter() - began:.0f} s", flush=True)
        except Exception as error:
            failed[peer] = f"{type(error).__name__}: {(str(error).splitlines() or [''])[0][:200]}"
            print(f"  {peer}: {failed[peer]}", flush=True)
    found = milliseconds(ways)
    used = engine.runner.bytes_a_token([context] * batch)
    floor = used / machine.load("h200-sxm").bandwidths["memory"].value * 1e3
    shown = {"model": name, "batch": batch, "context": context, "ms": found, "failed": failed}
    return shown | {"bytes": used, "floor_ms": floor, "slack": found["taut"] / floor}


def opened(name: str, longest: int) -> tuple[Any, Program, dict[str, float]]:
    """The model, its program, and the errors of both."""
    model = build(name)
    began = time.perf_counter()
    engine = taut.compile(model, device=DEVICE, max_length=longest + ROOM)
    print(f"{name}: compiled in {time.perf_counter() - began:.0f} s", flush=True)
    engine = Engine(replace(engine.program, max_length=PROMPT + ROOM), device=DEVICE)
    errors = parity(model, engine)
    print(f"{name}: errors {errors}", flush=True)
    return model, engine.program, errors


def prepare(name: str) -> None:
    """Fill the compiler's caches, so that the timed process finds the peer compiled."""
    theirs(build(name), *CASES[0], compiled=True)


def all_opened(names: list[str], longest: int, peers: bool) -> dict[str, tuple[Any, Program, dict[str, float]]]:
    """Every model, its program and errors; meanwhile other processes compile the peers."""
    with ProcessPoolExecutor(len(names), get_context("spawn")) as pool:
        waiting = [pool.submit(prepare, name) for name in names if peers]
        models = {name: opened(name, longest) for name in names}
        for name, compiling in zip(names, waiting, strict=False):
            print(f"{name}: peer compiled, {compiling.exception() or 'as it should'}", flush=True)
    return models


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/decode.json"))
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--quick", action="store_true", help="batch 1 behind the short prompt alone")
    parser.add_argument("--no-peers", dest="peers", action="store_false")
    args = parser.parse_args()
    cases = CASES[:1] if args.quick else CASES
    rows, models = [], all_opened(args.only, max(length for _, length in cases), args.peers)
    peers = [{"transformers, eager kernels": False}, {"transformers, torch.compile": True}] if args.peers else [{}]
    plan = [(*cases[0], name, beside) for beside in peers for name in args.only]
    plan += [(*case, name, peers[0]) for case in cases[1:] for name in args.only]
    for batch, context, name, beside in plan:
        torch.cuda.empty_cache()
        rows.append(found := row(name, *models[name][:2], batch, context, beside))
        times = {way: round(ms, 4) for way, ms in found["ms"].items()}
        print(f"{name:5} batch {batch:3} context {context:6} {times} slack {found['slack']:.2f}", flush=True)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "prompt": PROMPT}
        errors = {known: model[2] for known, model in models.items()}
        args.out.write_text(json.dumps({**head, "errors": errors, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
