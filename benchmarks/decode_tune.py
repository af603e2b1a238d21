"""Which tile sizes decode one row the fastest on this GPU: the choices of `taut/runtime/_triton/kernels.py`, measured.

    python benchmarks/decode_tune.py [--out benchmarks/results/h200/decode_tune.json] [--only 135M 1B 8B] [--workers 14]

Programs of the shapes of `decode.py` with random weights, of the larger two a few layers alone. A candidate is timed in
the whole step, since its neighbours decide how early it starts: a CUDA graph from token to token behind 512 positions,
the best of some runs. It is taken where it is faster by half a percent. Each candidate's logits must err at most twice
as much as plain bf16 code's. The last lines are what `kernels.py` then says; the profile has a step's kernels in order.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
import triton
from decode import GREEDY, PROMPT, ROOM, SHAPES
from torch import Tensor

from taut.ops._triton.launch import Config
from taut.runtime._triton.kernels import MOST_FEATURES, one_row
from taut.runtime._triton.launch import Reach
from taut.runtime.cuda import CudaRunner, LongRunner
from taut.runtime.plain import PlainRunner
from taut.runtime.steps import Attend, Embed, Glu, Linear, Norm, Program, Rotary, View, Weight

Knob = tuple
"""("near",) and ("far",) for attention, or a product: (outputs, inputs, whether it is gated)."""

LAYERS = {"135M": 30, "1B": 6, "8B": 4}
NEAR_TRIED = [(128, 5, 4), (128, 5, 8), (128, 5, 2), (128, 6, 4), (128, 7, 4), (128, 8, 4), (256, 3, 8), (256, 3, 4)]
NEAR_TRIED += [(256, 4, 8), (64, 9, 2), (64, 9, 4), (64, 12, 4), (64, 16, 2)]  # with room for the positions timed
FAR_TRIED = [(64, 64, 4), (64, 64, 8), (128, 128, 4), (128, 128, 8), (64, 128, 4), (32, 64, 4)]
GAIN = 0.995


def program(name: str, layers: int, device: str = "cuda") -> Program:
    """The decode program of a Llama with random weights in bfloat16."""
    torch.manual_seed(0)
    sizes = SHAPES[name]
    width, inner, vocabulary = sizes["hidden_size"], sizes["intermediate_size"], sizes["vocab_size"]
    heads, kv, d = sizes["num_attention_heads"], sizes["num_key_value_heads"], sizes["head_dim"]

    def matrix(n: int, k: int) -> Weight:
        return Weight(torch.randn(n, k, dtype=torch.bfloat16, device=device) / k**0.5)

    of = lambda buffer, size: View(buffer, 0, size)  # noqa: E731
    angles = torch.outer(torch.arange(PROMPT + ROOM), 10_000 ** -torch.arange(0, 1, 2 / d))
    rotary, norm, q, rest = Rotary(angles.cos(), angles.sin()), Norm(1e-5), heads * d, kv * d
    table = matrix(vocabulary, width)
    steps: list[Any] = [Embed("x0", table)]
    widths = {"x0": width, "logits": vocabulary}
    for i in range(layers):
        x, after = f"x{i}", f"x{i + 1}"
        qkv, y, mid, h = f"qkv{i}", f"y{i}", f"mid{i}", f"h{i}"
        widths |= {qkv: q + 2 * rest, y: q, mid: width, h: inner, after: width}
        views = of(qkv, q), View(qkv, q, q + rest), View(qkv, q + rest, q + 2 * rest)
        steps += [
            Linear(qkv, of(x, width), matrix(q + 2 * rest, width), norm=norm),
            Attend(y, *views, i, heads, kv, d, d, d**-0.5, rotary),
            Linear(mid, of(y, q), matrix(width, q), residual=of(x, width)),
            Glu(h, of(mid, width), matrix(inner, width), matrix(inner, width), "silu", norm=norm),
            Linear(after, of(h, inner), matrix(width, inner), residual=of(mid, width)),
        ]
    steps.append(Linear("logits", of(f"x{layers}", width), table, norm=norm))
    return Program(tuple(steps), widths, "logits", ((kv, d, d),) * layers, PROMPT + ROOM)


def knobs(made: Program) -> list[Knob]:
    """What can be chosen for a program, each once, in the order of its steps."""
    found: list[Knob] = []
    for step in made.steps:
        if isinstance(step, Linear):
            found.append((*step.weight.data.shape, False))
        elif isinstance(step, Glu):
            found.append((*step.gate.data.shape, True))
    heads = next(step for step in made.steps if isinstance(step, Attend))
    attention = ("near",) if heads.heads * heads.dv <= MOST_FEATURES else ("far",)
    return [attention, *dict.fromkeys(found)]


def candidates(knob: Knob) -> Iterator[Reach | Config]:
    """What is worth trying."""
    if knob == ("near",):
        yield from (Reach(keys, splits, 64, warps) for keys, splits, warps in NEAR_TRIED)
        return
    if knob == ("far",):
        yield from (Reach(keys, 16, least, warps) for keys, least, warps in FAR_TRIED)
        return
    n, k, gated = knob
    whole = triton.next_power_of_2(k)
    at_once = (whole,) if whole <= 2048 else (512, 1024, 2048)
    for outputs, inputs, warps in itertools.product((1, 2, 4, 8, 16), at_once, (1, 2, 4, 8)):
        held = outputs * min(inputs, k) * (2 if gated else 1) // (32 * warps)
        least, most = (8, 96) if whole <= 2048 else (16, 64)
        if not least <= held <= most or n // outputs < 64 or (inputs < k and warps < 4):
            continue
        if inputs < k:
            yield from (Config(outputs, 0, inputs, warps=warps, ahead=ahead) for ahead in (0, 512))
        else:
            yield from (Config(outputs, 0, inputs, split, warps=warps) for split in ((1,) if k == whole else (1, 2)))


def choose(runner: CudaRunner, knob: Knob, value: Reach | Config) -> None:
    kernels = runner.kernels
    if isinstance(value, Reach):
        setattr(kernels, knob[0], value)
    else:
        kernels.one_row = kernels.one_row | {knob: value}
    runner.graphs.clear()


def chosen(runner: CudaRunner, knob: Knob) -> Reach | Config:
    return getattr(runner.kernels, knob[0]) if len(knob) == 1 else one_row(*knob, runner.kernels.one_row)


class Timed:
    """A program whose choices are timed, with the error that plain code makes."""

    def __init__(self, name: str, layers: int) -> None:
        made = program(name, layers)
        self.runner = CudaRunner(made, 1)
        for pair in self.runner.caches:
            for cache in pair:
                cache.normal_()
        self.given = torch.tensor([7]), torch.tensor([PROMPT]), torch.tensor([0])
        on_gpu = [t.cuda() for t in self.given]
        copies = lambda dtype: [tuple(t.to(dtype, copy=True) for t in pair) for pair in self.runner.caches]  # noqa: E731
        placed: Any = self.runner.program
        self.truth = PlainRunner(placed, 0, copies(torch.float64), torch.float64).run(*on_gpu)
        self.plain = self.error(LongRunner(placed, copies(torch.bfloat16), torch.bfloat16).run(*on_gpu))

    def error(self, logits: Tensor) -> float:
        return float((logits.double() - self.truth).norm() / self.truth.norm())

    def us(self, runs: int = 4, replays: int = 40) -> float:
        """Microseconds of a step; infinite where it is wrong, or does not fit."""
        try:
            if not self.error(self.runner.run(*self.given)) <= 2 * self.plain:
                return float("inf")
        except triton.runtime.errors.OutOfResources:
            return float("inf")
        self.runner.put(*self.given)
        self.runner.play(1, GREEDY)
        best = float("inf")
        for _ in range(runs):
            self.runner.put(*self.given)
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(replays):
                self.runner.play(1, GREEDY)
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) * 1e3 / replays)
        return best

    def profile(self, replays: int = 20) -> list[dict[str, Any]]:
        """A step's kernels in order: microseconds that each took, and from its end to the end of the next."""
        from torch.autograd import DeviceType
        from torch.profiler import ProfilerActivity, profile

        self.us(1, 1)
        self.runner.put(*self.given)
        with profile(activities=[ProfilerActivity.CUDA]) as seen:
            for _ in range(replays):
                self.runner.play(1, GREEDY)
            torch.cuda.synchronize()
        events = [e for e in seen.events() if e.device_type == DeviceType.CUDA and "mem" not in e.name.lower()]
        events.sort(key=lambda e: e.time_range.end)
        count = len(events) // replays
        found = []
        for i in range(count):
            mine = events[i::count][1:]
            before = events[i - 1 :: count][1:] if i else mine
            took = sum(e.time_range.end - e.time_range.start for e in mine) / len(mine)
            step = sum(a.time_range.end - b.time_range.end for a, b in zip(mine, before, strict=False)) / len(mine)
            found.append({"kernel": mine[0].name, "took_us": round(took, 2), "behind_us": round(step, 2)})
        return found


def tune(name: str, rounds: int) -> dict[str, Any]:
    timed = Timed(name, LAYERS[name])
    first = best = timed.us()
    print(f"{name}, {LAYERS[name]} layers: {first:.1f} us, plain error {timed.plain:.4f}", flush=True)
    tried, mine = [], knobs(timed.runner.program)
    for knob in mine * rounds:
        kept = chosen(timed.runner, knob)
        for value in candidates(knob):
            choose(timed.runner, knob, value)
            us = timed.us()
            tried.append([list(knob), list(value), round(us, 2)])
            if us < GAIN * best:
                best, kept = us, value
        choose(timed.runner, knob, kept)
        print(f"  {knob}: {kept}, {best:.1f} us", flush=True)
    best = timed.us()
    print(f"{name}: {first:.1f} to {best:.1f} us", flush=True)
    choices = [[list(knob), list(chosen(timed.runner, knob))] for knob in mine]
    for knob in mine:
        print(f"    {knob}: {chosen(timed.runner, knob)},")
    shown = {"layers": LAYERS[name], "before_us": first, "after_us": best, "choices": choices, "tried": tried}
    return shown | {"profile": timed.profile()}


def compile_all(names: list[str], workers: int) -> None:
    """Fill Triton's cache with every kernel to be tried, in as many processes."""
    with ProcessPoolExecutor(workers, get_context("spawn")) as pool:
        list(pool.map(_compile, [(names, i, workers) for i in range(workers)]))


def _compile(job: tuple[list[str], int, int]) -> None:
    names, mine, workers = job
    for name in names:
        runner = CudaRunner(program(name, 1), 1, capture=False)
        every = [(knob, value) for knob in knobs(runner.program) for value in candidates(knob)]
        for knob, value in every[mine::workers]:
            choose(runner, knob, value)
            try:
                runner.run(torch.tensor([7]), torch.tensor([PROMPT]), torch.tensor([0]))
            except triton.runtime.errors.OutOfResources:
                continue
        del runner
        torch.cuda.empty_cache()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/decode_tune.json"))
    parser.add_argument("--only", nargs="*", default=list(SHAPES))
    parser.add_argument("--workers", type=int, default=14, help="processes that compile beforehand; 0 for none")
    parser.add_argument("--rounds", type=int, default=1, help="how often every choice is made again, after the others")
    args = parser.parse_args()
    began = time.perf_counter()
    if args.workers:
        compile_all(args.only, args.workers)
        print(f"compiled in {time.perf_counter() - began:.0f} s", flush=True)
    found = {}
    for name in args.only:
        found[name] = tune(name, args.rounds)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": triton.__version__}
        args.out.write_text(json.dumps({**head, "models": found}, indent=1) + "\n")
        torch.cuda.empty_cache()
    print(f"done in {time.perf_counter() - began:.0f} s", flush=True)


if __name__ == "__main__":
    main()
