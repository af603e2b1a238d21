"""Train one small Llama with every normalization: held-out loss against steps and against time, three seeds each.

    python benchmarks/norms.py --prepare WORK       # tokens from the texts that train_demo.py left in WORK (no GPU)
    python benchmarks/norms.py --seconds 500        # the runs, on one GPU; as many steps each as the time allows
    python benchmarks/norms_table.py                # table and picture from the recorded runs (no GPU)

The variants differ in the norm alone: same layers, same first weights for a seed, same order of the data, same
optimizer, warm-up, clipping and number of steps. Each takes the best of the same few learning rates, found in short
runs of a seed that is not used again. A process a variant compiles its model and records one training step as a CUDA
graph; then one run at a time has the GPU to itself, so that its clock times the GPU and not the host. After each run
the record is written anew.
"""

from __future__ import annotations

import argparse
import itertools
import json
import lzma
import math
import multiprocessing
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taut.nn.norm.ada_norm import AdaNorm
from taut.nn.norm.dyt import DyT
from taut.nn.norm.mx import MXNorm
from taut.nn.norm.rms_norm import RMSNorm
from taut.nn.norm.simple_rms_norm import SimpleRMSNorm

HERE = Path(__file__).parent
RECORD = HERE / "results" / "h200" / "norms.json"
PASSES = 2


@dataclass(frozen=True)
class Settings:
    """Everything that the variants share."""

    width: int = 320
    hidden: int = 896
    layers: int = 6
    heads: int = 5
    vocabulary: int = 3072
    context: int = 512
    batch: int = 64
    evaluations: int = 12
    held_out_batches: int = 8
    learning_rates: tuple[float, ...] = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3)
    trial: float = 0.2
    """Steps of a run that finds a learning rate, as a share of a full run's."""
    trial_seed: int = 100
    decay: float = 0.1
    """The last learning rate of a run, as a share of its greatest."""
    warmup: float = 0.05
    clip: float = 1.0
    weight_decay: float = 0.1
    seeds: int = 3


class DeferredRMSNorm(nn.Module):
    """Stands for the weightless RMSNorm whose division follows the linear layer: (x W) s in place of (x s) W."""

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        return torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + self.eps)


NORMS: dict[str, Callable[[int], nn.Module]] = {
    "LayerNorm": nn.LayerNorm,
    "RMSNorm": RMSNorm,
    "pRMSNorm 6.25%": partial(RMSNorm, partial=0.0625),
    "SimpleRMSNorm": SimpleRMSNorm,
    "weightless, deferred": DeferredRMSNorm,
    "AdaNorm": AdaNorm,
    "DyT": partial(DyT, alpha=1.0),
    "MXNorm": MXNorm,
}


class NormLinear(nn.Module):
    """linear(norm(x)) for x [..., d]; with a deferred norm, linear(x) times its scalar."""

    def __init__(self, norm: nn.Module, d: int, outputs: int) -> None:
        super().__init__()
        self.norm, self.linear = norm, nn.Linear(d, outputs, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        if not isinstance(self.norm, DeferredRMSNorm):
            return self.linear(self.norm(x))
        y = self.linear(x)
        return (y * self.norm(x)).to(y.dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    a, b = x.chunk(2, -1)
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)


class Block(nn.Module):
    """Attention and SwiGLU feed-forward, each behind its norm: x [batch, n, d] to the same."""

    def __init__(self, norm: Callable[[int], nn.Module], s: Settings) -> None:
        super().__init__()
        self.heads = s.heads
        self.qkv, self.out = NormLinear(norm(s.width), s.width, 3 * s.width), nn.Linear(s.width, s.width, bias=False)
        self.up = NormLinear(norm(s.width), s.width, 2 * s.hidden)
        self.down = nn.Linear(s.hidden, s.width, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(rotate(q, cos, sin), rotate(k, cos, sin), v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).flatten(2))
        gate, up = self.up(x).chunk(2, -1)
        return x + self.down(F.silu(gate) * up)


class Head(nn.Module):
    """Mean cross-entropy of the next tokens [batch, n] given x [batch, n, d]."""

    def __init__(self, norm: nn.Module, s: Settings) -> None:
        super().__init__()
        self.logits = NormLinear(norm, s.width, s.vocabulary)

    def forward(self, x: Tensor, target: Tensor) -> Tensor:
        return F.cross_entropy(self.logits(x).float().flatten(0, 1), target.flatten())


class Llama(nn.Module):
    """The loss on a window of tokens [batch, n + 1]."""

    cos: Tensor
    sin: Tensor

    def __init__(self, norm: Callable[[int], nn.Module], s: Settings) -> None:
        super().__init__()
        self.embedding = nn.Embedding(s.vocabulary, s.width)
        self.blocks = nn.ModuleList(Block(norm, s) for _ in range(s.layers))
        self.head = Head(norm(s.width), s)
        # Without a norm nothing lifts small embeddings; the authors of DyT multiply them by a trained scalar.
        unnormed = isinstance(self.head.logits.norm, DyT)
        self.scale = nn.Parameter(torch.tensor(math.sqrt(s.width))) if unnormed else None
        half = s.width // s.heads // 2
        angle = torch.outer(torch.arange(s.context), 10000.0 ** (-torch.arange(half) / half))
        self.register_buffer("cos", angle.cos(), persistent=False)
        self.register_buffer("sin", angle.sin(), persistent=False)

    def forward(self, window: Tensor) -> Tensor:
        x = self.embedding(window[:, :-1])
        if self.scale is not None:
            x = x * self.scale
        for block in self.blocks:
            x = block(x, self.cos, self.sin)
        return self.head(x, window[:, 1:])


def fresh(name: str, s: Settings, seed: int) -> Llama:
    """The variant before its first step; all variants of a seed have the same matrices."""
    model = Llama(NORMS[name], s)
    torch.manual_seed(seed)
    for path, module in model.named_modules():
        if isinstance(module, nn.Linear | nn.Embedding):
            depth = math.sqrt(2 * s.layers) if path.endswith((".out", ".down")) else 1
            nn.init.normal_(module.weight, std=0.02 / depth)
    return model


def windows(tokens: Tensor, s: Settings, seed: int) -> Iterator[Tensor]:
    """Passes over the tokens in random order without end, as int64 [batch, context + 1]."""
    rng = torch.Generator().manual_seed(seed)
    span = torch.arange(s.context + 1, device=tokens.device)
    while True:
        starts = torch.randperm((len(tokens) - 1) // s.context, generator=rng) * s.context
        for chunk in starts.to(tokens.device).split(s.batch):
            if len(chunk) == s.batch:
                yield tokens[chunk[:, None] + span].long()


def held_out_windows(tokens: Tensor, s: Settings) -> list[Tensor]:
    """Batches spread evenly over the held-out tokens."""
    count = s.held_out_batches * s.batch
    starts = torch.linspace(0, len(tokens) - s.context - 1, count).long().to(tokens.device)
    span = torch.arange(s.context + 1, device=tokens.device)
    return list(tokens[starts[:, None] + span].long().split(s.batch))


def optimizer(model: nn.Module, s: Settings, rate: Tensor) -> torch.optim.AdamW:
    """AdamW; only matrices decay. `rate` is read anew at every step."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    groups = [group for group in groups if group["params"]]
    return torch.optim.AdamW(groups, lr=rate, betas=(0.9, 0.95), fused=True, capturable=rate.device.type == "cuda")


def schedule(step: int, steps: int, s: Settings) -> float:
    """Share of the greatest learning rate: a linear rise, then a cosine down to `decay`."""
    warm = max(1, round(s.warmup * steps))
    if step < warm:
        return (step + 1) / warm
    cosine = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    return s.decay + (1 - s.decay) * cosine


class Runner:
    """One variant's compiled model and its data, on one device."""

    def __init__(self, name: str, s: Settings, data: Path, device: str) -> None:
        self.name, self.s, self.device = name, s, torch.device(device)
        self.tokens, self.held = (read(data / f"{part}.xz").to(device) for part in ("train", "heldout"))
        self.batches = held_out_windows(self.held, s)
        self.window = self.batches[0].clone()
        self.model = fresh(name, s, 0).to(device)
        self.rate = torch.tensor(0.0, device=self.device)
        self.optimizer = optimizer(self.model, s, self.rate)
        self.step = self.plain_step
        if self.device.type == "cuda":
            for module in (*self.model.blocks, self.model.head):
                module.compile()
            self.step = self.recorded_step()

    def loss(self, window: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(window)

    def plain_step(self) -> None:
        self.loss(self.window).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), self.s.clip)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def recorded_step(self) -> Callable[[], None]:
        """`plain_step` as a CUDA graph, after a few that compile it."""
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                self.plain_step()
        torch.cuda.current_stream().wait_stream(stream)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            self.plain_step()
        return graph.replay

    def reset(self, seed: int) -> None:
        """Before the first step, in place: a recorded step goes on with the same tensors."""
        self.model.load_state_dict(fresh(self.name, self.s, seed).state_dict())
        for state in self.optimizer.state.values():
            for value in state.values():
                value.zero_()

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_per_step(self, steps: int) -> float:
        self.step()
        started = self.clock()
        for _ in range(steps):
            self.step()
        return (self.clock() - started) / steps

    def agreement(self) -> tuple[float, float]:
        """The compiled model against the plain one before the first step: difference of the losses, and the least
        cosine, over the matrices, between their gradients."""
        plain = fresh(self.name, self.s, 0).to(self.device)
        self.reset(0)
        losses, gradients = [], []
        for model in (self.model, plain):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                losses.append(model(self.batches[0]))
            matrices = [p for p in model.parameters() if p.ndim == 2]
            gradients.append(torch.autograd.grad(losses[-1], matrices))
        cosines = [F.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(*gradients, strict=True)]
        return (losses[0] - losses[1]).item(), min(cosines)

    def held_out_loss(self) -> float:
        # The training graph without its backward pass: no second compilation.
        return torch.stack([self.loss(batch).detach() for batch in self.batches]).mean().item()

    def train(self, seed: int, steps: int, rate: float, evaluations: int) -> list[list[float | None]]:
        """A run's curve: [step, seconds of training alone, held-out loss] at each evaluation."""
        self.reset(seed)
        curve, seconds = [], 0.0
        stops = {round(steps * i / evaluations) for i in range(1, evaluations + 1)}
        started = self.clock()
        for step, window in zip(range(1, steps + 1), windows(self.tokens, self.s, seed), strict=False):
            self.rate.fill_(rate * schedule(step - 1, steps, self.s))
            self.window.copy_(window)
            self.step()
            if step in stops:
                seconds += self.clock() - started
                curve.append([step, round(seconds, 3), finite(self.held_out_loss())])
                started = self.clock()
        return curve


def finite(loss: float) -> float | None:
    return round(loss, 5) if math.isfinite(loss) else None


def read(path: Path) -> Tensor:
    """Tokens int32 [n] from a compressed file of 16-bit ones."""
    return torch.from_numpy(np.frombuffer(lzma.decompress(path.read_bytes()), np.uint16).astype(np.int32))


def prepare(work: Path, data: Path, count: int) -> None:
    """`count` training tokens and all held-out ones from train_demo.py's texts, as `read` reads them."""
    import train_demo

    train_demo.prepare(work)
    data.mkdir(parents=True, exist_ok=True)
    for part, limit in (("train", count), ("heldout", 10**9)):
        tokens = train_demo.encode(work / f"{part}.xz", torch.device("cpu"), limit)[:limit]
        (data / f"{part}.xz").write_bytes(lzma.compress(tokens.numpy().astype(np.uint16).tobytes(), preset=0))


def work(pipe: Connection, name: str, s: Settings, data: Path, device: str) -> None:
    """A process: make a runner, then call its methods as asked. An error is the answer; None is the end."""
    runner = None
    while request := pipe.recv():
        method, arguments = request
        try:
            runner = runner or Runner(name, s, data, device)
            pipe.send(getattr(runner, method)(*arguments))
        except Exception as error:
            pipe.send(error)


class Worker:
    def __init__(self, name: str, s: Settings, data: Path, device: str) -> None:
        self.name = name
        self.pipe, theirs = (context := multiprocessing.get_context("spawn")).Pipe()
        self.process = context.Process(target=work, args=(theirs, name, s, data, device), daemon=True)
        self.process.start()

    def ask(self, method: str, *arguments: Any) -> None:
        self.pipe.send((method, arguments))

    def call(self, method: str, *arguments: Any) -> Any:
        self.ask(method, *arguments)
        return self.answer()

    def stop(self) -> None:
        self.pipe.send(None)
        self.process.join()

    def answer(self) -> Any:
        """Raises RuntimeError with the process's error, named after the variant."""
        result = self.pipe.recv()
        if isinstance(result, Exception):
            raise RuntimeError(f"{self.name}: {type(result).__name__}: {result}") from result
        return result


def affordable(step_seconds: list[float], seconds: float, tokens: int, s: Settings) -> int:
    """Steps for every run, such that all runs of all variants fit into the time and none exceeds its passes."""
    evaluating = s.evaluations * s.held_out_batches / 3
    runs = s.seeds + len(s.learning_rates) * s.trial
    by_time = (0.93 * seconds / sum(step_seconds) - s.seeds * evaluating) / runs
    by_data = PASSES * ((tokens - 1) // s.context // s.batch)
    return int(min(by_time, by_data))


def times_alone(workers: list[Worker]) -> dict[str, float]:
    """Seconds per step of each variant: compiled together, then timed one after another, three times, the median."""
    for worker in workers:
        worker.ask("seconds_per_step", 1)
    for worker in workers:
        worker.answer()
    times = {worker.name: [] for worker in workers}
    for _, worker in itertools.product(range(3), workers):
        times[worker.name].append(worker.call("seconds_per_step", 20))
    return {name: sorted(found)[1] for name, found in times.items()}


def heading(s: Settings, tokens: int, steps: int, alone: dict[str, float], device: str) -> dict[str, Any]:
    """The record before its runs."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": asdict(s),
        "train_tokens": tokens,
        "steps": steps,
        "passes": round(steps * s.batch * s.context / tokens, 3),
        "parameters": {name: sum(p.numel() for p in fresh(name, s, 0).parameters()) for name in alone},
        "step_seconds": {name: round(seconds, 6) for name, seconds in alone.items()},
        "compiled_agreement": {},
        "trials": {},
        "learning_rate": {},
        "runs": [],
    }


def choose_rate(worker: Worker, s: Settings, steps: int, record: dict[str, Any]) -> None:
    """Into the record: held-out loss of a short run with each learning rate, and the rate of the least."""
    short = max(1, round(s.trial * steps))
    losses = [worker.call("train", s.trial_seed, short, rate, 1)[-1][2] for rate in s.learning_rates]
    record["trials"][worker.name] = dict(zip(map(str, s.learning_rates), losses, strict=True))
    finished = [(loss, rate) for loss, rate in zip(losses, s.learning_rates, strict=True) if loss is not None]
    record["learning_rate"][worker.name] = min(finished)[1] if finished else min(s.learning_rates)


def measure(
    s: Settings, data: Path, out: Path, device: str, seconds: float, steps: int | None, names: Iterable[str] = NORMS
) -> dict[str, Any]:
    """All runs, within `seconds`; the record so far is in `out` after each of them."""
    until = time.perf_counter() + seconds
    workers = [Worker(name, s, data, device) for name in names]
    alone = times_alone(workers)
    told(f"compiled: {alone}", until)
    tokens = len(read(data / "train.xz"))
    agreements = {worker.name: [round(v, 6) for v in worker.call("agreement")] for worker in workers}
    told(f"compiled against plain: {agreements}", until)
    steps = steps or affordable(list(alone.values()), until - time.perf_counter() - 10, tokens, s)
    record, longest = heading(s, tokens, steps, alone, device), 0.0
    record["compiled_agreement"] = agreements
    for worker in workers:
        choose_rate(worker, s, steps, record)
    save(record, out)
    told(f"{steps} steps each; held-out loss by learning rate: {record['trials']}", until)
    for seed, worker in itertools.product(range(s.seeds), workers):
        begun = time.perf_counter()
        if until - begun < longest + 3:
            told(f"no time for {worker.name}, seed {seed}", until)
            continue
        curve = worker.call("train", seed, steps, record["learning_rate"][worker.name], s.evaluations)
        record["runs"].append({"norm": worker.name, "seed": seed, "curve": curve})
        save(record, out)
        longest = max(longest, time.perf_counter() - begun)
        told(f"{worker.name}, seed {seed}: {curve[-1]}", until)
    for worker in workers:
        worker.stop()
    return record


def told(what: str, until: float) -> None:
    print(f"[{until - time.perf_counter():.0f} s left] {what}", file=sys.stderr, flush=True)


def save(record: dict[str, Any], out: Path) -> None:
    """JSON with a line a run."""
    head = json.dumps({k: v for k, v in record.items() if k != "runs"})[:-1]
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(head + ', "runs": [\n' + ",\n".join(map(json.dumps, record["runs"])) + "\n]}\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=Path(".demo"), help="folder of train.xz and heldout.xz (tokens)")
    parser.add_argument("--out", type=Path, default=RECORD)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--seconds", type=float, default=500, help="for everything, compilation included")
    parser.add_argument("--steps", type=int, help="of every run; else what the time allows")
    parser.add_argument("--prepare", type=Path, metavar="WORK", help="write --data from train_demo.py's work folder")
    parser.add_argument("--tokens", type=int, default=24_000_000, help="training tokens that --prepare writes")
    args = parser.parse_args()
    if args.prepare:
        return prepare(args.prepare, args.data, args.tokens)
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "2")
    measure(Settings(), args.data, args.out, args.device, args.seconds, args.steps)


if __name__ == "__main__":
    main()
