"""Train one small Llama with every normalization: held-out loss against steps and against time, three seeds each.

    python benchmarks/norms.py --prepare WORK       # tokens from the texts that train_demo.py left in WORK (no GPU)
    python benchmarks/norms.py --seconds 500        # the runs, on one GPU; as many steps each as the time allows
    python benchmarks/norms_table.py                # table and picture from the recorded runs (no GPU)

The variants differ in the norm alone: same layers, same first weights for a seed, same order of the data, same
optimizer and learning rate, same number of steps. A process a variant compiles its model; then one run at a time has
the GPU to itself, so that its clock means something. After each run the record is written anew.
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
    learning_rate: float = 2e-3
    least_learning_rate: float = 2e-4
    warmup: float = 0.05
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


def optimizer(model: nn.Module, s: Settings) -> torch.optim.AdamW:
    """AdamW; only matrices decay."""
    matrices = [p for p in model.parameters() if p.ndim == 2]
    others = [p for p in model.parameters() if p.ndim < 2]
    groups = [{"params": matrices, "weight_decay": s.weight_decay}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=s.learning_rate, betas=(0.9, 0.95), fused=True)


def rate(step: int, steps: int, s: Settings) -> float:
    warm = max(1, round(s.warmup * steps))
    if step < warm:
        return s.learning_rate * (step + 1) / warm
    cosine = (1 + math.cos(math.pi * (step - warm) / max(1, steps - warm))) / 2
    return s.least_learning_rate + (s.learning_rate - s.least_learning_rate) * cosine


class Runner:
    """One variant's compiled model and its data, on one device."""

    def __init__(self, name: str, s: Settings, data: Path, device: str) -> None:
        self.name, self.s, self.device = name, s, torch.device(device)
        self.tokens, self.held = (read(data / f"{part}.xz").to(device) for part in ("train", "heldout"))
        self.batches = held_out_windows(self.held, s)
        self.model = fresh(name, s, 0).to(device)
        if self.device.type == "cuda":
            for module in (*self.model.blocks, self.model.head):
                module.compile()

    def loss(self, window: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return self.model(window)

    def step(self, opt: torch.optim.Optimizer, window: Tensor) -> None:
        self.loss(window).backward()
        nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        opt.step()
        opt.zero_grad()

    def clock(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def seconds_per_step(self, steps: int = 20) -> float:
        opt, data = optimizer(self.model, self.s), windows(self.tokens, self.s, 0)
        for _ in range(3):
            self.step(opt, next(data))
        started = self.clock()
        for _ in range(steps):
            self.step(opt, next(data))
        return (self.clock() - started) / steps

    def agreement(self) -> float:
        """Least cosine, over the matrices, between the compiled model's gradient and the plain one's, at the start."""
        plain, window = fresh(self.name, self.s, 0).to(self.device), self.batches[0]
        self.model.load_state_dict(plain.state_dict())
        gradients = []
        for model in (self.model, plain):
            with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
                loss = model(window)
            matrices = [p for p in model.parameters() if p.ndim == 2]
            gradients.append(torch.autograd.grad(loss, matrices))
        return min(F.cosine_similarity(a.flatten(), b.flatten(), 0).item() for a, b in zip(*gradients, strict=True))

    def held_out_loss(self) -> float:
        # The training graph without its backward pass: no second compilation.
        return torch.stack([self.loss(batch).detach() for batch in self.batches]).mean().item()

    def train(self, seed: int, steps: int) -> dict[str, Any]:
        """The record of one run: its curve is [step, seconds of training alone, held-out loss]."""
        self.model.load_state_dict(fresh(self.name, self.s, seed).state_dict())
        opt, curve, seconds = optimizer(self.model, self.s), [], 0.0
        stops = [round(steps * i / self.s.evaluations) for i in range(1, self.s.evaluations + 1)]
        started = self.clock()
        for step, window in zip(range(1, steps + 1), windows(self.tokens, self.s, seed), strict=False):
            for group in opt.param_groups:
                group["lr"] = rate(step - 1, steps, self.s)
            self.step(opt, window)
            if step in stops:
                seconds += self.clock() - started
                curve.append([step, round(seconds, 3), finite(self.held_out_loss())])
                started = self.clock()
        return {"norm": self.name, "seed": seed, "curve": curve}


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
    for part, limit in (("train", count), ("heldout", None)):
        tokens = train_demo.encode(work / f"{part}.xz", torch.device("cpu"))[:limit]
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
    """Steps for every run, such that all seeds of all variants fit into the time and none exceeds its passes."""
    evaluating = s.evaluations * s.held_out_batches / 3
    by_time = 0.93 * seconds / (s.seeds * sum(step_seconds)) - evaluating
    by_data = PASSES * ((tokens - 1) // s.context // s.batch)
    return int(min(by_time, by_data))


def times_alone(workers: list[Worker]) -> list[float]:
    """Seconds per step of each variant, compiled together and then timed one after another."""
    for worker in workers:
        worker.ask("seconds_per_step", 3)
    for worker in workers:
        worker.answer()
    return [worker.call("seconds_per_step", 20) for worker in workers]


def heading(s: Settings, tokens: int, steps: int, workers: list[Worker], device: str) -> dict[str, Any]:
    """The record before its runs."""
    return {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "torch": torch.__version__,
        "settings": asdict(s),
        "train_tokens": tokens,
        "steps": steps,
        "passes": round(steps * s.batch * s.context / tokens, 3),
        "parameters": {
            name: sum(p.numel() for p in fresh(name, s, 0).parameters()) for name in (worker.name for worker in workers)
        },
        "compiled_agreement": {worker.name: round(worker.call("agreement"), 6) for worker in workers},
        "runs": [],
    }


def measure(
    s: Settings, data: Path, out: Path, device: str, seconds: float, steps: int | None, names: Iterable[str] = NORMS
) -> dict[str, Any]:
    """All runs, within `seconds`; the record so far is in `out` after each of them."""
    until = time.perf_counter() + seconds
    workers = [Worker(name, s, data, device) for name in names]
    alone = times_alone(workers)
    tokens = len(read(data / "train.xz"))
    steps = steps or affordable(alone, until - time.perf_counter() - 10, tokens, s)
    record, longest = heading(s, tokens, steps, workers, device), 0.0
    for seed, worker in itertools.product(range(s.seeds), workers):
        begun = time.perf_counter()
        if until - begun < longest + 3:
            print(f"no time for {worker.name}, seed {seed}", file=sys.stderr, flush=True)
            continue
        record["runs"].append(worker.call("train", seed, steps))
        save(record, out)
        longest = max(longest, time.perf_counter() - begun)
        print(f"{worker.name}, seed {seed}: {until - time.perf_counter():.0f} s left", file=sys.stderr, flush=True)
    for worker in workers:
        worker.stop()
    return record


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
