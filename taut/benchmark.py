"""Before against after in one run: transformers and taut's engine, interleaved, and nothing printed that is not equal.

Parity comes first (see `taut/parity.py`); where it fails there are no numbers. Prefill and decode are timed apart, all
runners in turn in each round, beside a read of memory, since a machine's speed changes under one's feet.
"""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

from taut import machine as machines
from taut.checkpoint import BadInput, open_checkpoint
from taut.coded import BITS
from taut.cost import Cost, Workload, cost
from taut.lossy import DRAWS
from taut.machine import Figure, Machine
from taut.op import Work
from taut.parity import Parity, Runner, bounded, forced, greedy, in_float64, same_function
from taut.plans import Plan
from taut.whole_file import write_text

if TYPE_CHECKING:
    from taut.layers import Layer

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
STORED = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
"""Bytes of a weight as it lies in memory; int4 has a scale of two bytes a group of 32."""
POSITIONS = 16
"""What is done to a decoding step does not depend on how many there are."""

Progress = Callable[[str, int, int], None]


class Engine(Protocol):
    """What `taut.compile` gives, as far as it is timed: slot 0 alone is used."""

    def prefill(self, ids: Any, slot: int = 0) -> Tensor: ...
    def decode(self, tokens: Any) -> Tensor: ...
    def reset(self, slot: int | None = None) -> None: ...
    def explain(self) -> list[str]: ...


@dataclass
class Timed:
    """Seconds a pass (median and best), and what they amount to; slack below 1 means that a cache helped."""

    runner: str
    workload: str
    seconds: float
    best: float
    bytes: float
    flops: float
    slack: float

    @property
    def cached(self) -> bool:
        return self.slack < 1

    def as_dict(self) -> dict[str, Any]:
        rates = {"bytes_per_s": self.bytes / self.seconds, "flops_per_s": self.flops / self.seconds}
        return asdict(self) | rates | {"cached": self.cached}


@dataclass
class Bench:
    """One run. `rows` is empty where parity failed; `failed` says which runners could not run, and why.

    `apart` has the reason for each step that the engine leaves to torch; `plans` say what was applied and refused, to
    the checkpoint (where it is in taut form) and to the decoding step; `layers` have the time of each layer.
    """

    model: str
    weights: str
    prompt: int
    tokens: int
    parity: Parity
    machine: Machine
    rows: list[Timed] = field(default_factory=list)
    failed: dict[str, str] = field(default_factory=dict)
    apart: list[str] = field(default_factory=list)
    plans: list[Plan] = field(default_factory=list)
    layers: list[Layer] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)
    costs: list[Cost] = field(default_factory=list)

    @property
    def passed(self) -> bool:
        return self.parity.passed

    def as_dict(self) -> dict[str, Any]:
        shown = {"model": self.model, "weights": self.weights, "prompt": self.prompt, "tokens": self.tokens}
        rows = [row.as_dict() for row in self.rows]
        shown |= {"parity": self.parity.as_dict(), "rows": rows, "failed": self.failed}
        shown |= {"apart": self.apart, "plans": [plan.as_dict() for plan in self.plans]}
        shown["layers"] = [layer.as_dict() for layer in self.layers]
        return shown | {"machine": asdict(self.machine), "environment": self.environment}

    def save(self, path: Path) -> None:
        """Raises BadInput where the file cannot be written."""
        write_text(path, json.dumps(self.as_dict(), indent=1) + "\n")


class Eager:
    """transformers' own forward with its own cache."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.cache = None
        return self._run(ids)

    def step(self, token: int) -> Tensor:
        return self._run([token])

    @torch.inference_mode()
    def _run(self, ids: Sequence[int]) -> Tensor:
        out = self.model(input_ids=torch.tensor([list(ids)]), past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0, -1]


class Compiled(Eager):
    """The same forward through torch.compile, over a cache of fixed size."""

    def __init__(self, model: Any, length: int) -> None:
        super().__init__(model)
        self.length, self.position = length, 0
        self.forward = torch.compile(model.forward, dynamic=False)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        from transformers import StaticCache

        self.cache, self.position = StaticCache(self.model.config, max_cache_len=self.length), 0
        return self._run(ids)

    @torch.no_grad()
    def _run(self, ids: Sequence[int]) -> Tensor:
        places = torch.arange(self.position, self.position + len(ids))[None]
        given = {"past_key_values": self.cache, "use_cache": True, "position_ids": places}
        out = self.forward(input_ids=torch.tensor([list(ids)]), **given)
        self.position += len(ids)
        return out.logits[0, -1]


class Ours:
    """taut's engine on slot 0."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.engine.reset(0)
        return _row(self.engine.prefill(list(ids), 0))

    def step(self, token: int) -> Tensor:
        return _row(self.engine.decode([token]))


def _row(logits: Any) -> Tensor:
    return torch.as_tensor(logits).reshape(-1, logits.shape[-1])[-1]


def bench(
    model: str | Path | nn.Module,
    *,
    weights: str | None = None,
    against: str | Path | nn.Module | None = None,
    all: bool = False,
    prompt: int = 64,
    tokens: int = 64,
    rounds: int = 7,
    revision: str | None = None,
    trust_remote_code: bool = False,
    compile: Callable[..., Engine] | None = None,
    progress: Progress | None = None,
) -> Bench:
    """Time transformers and taut on a prompt of `prompt` tokens and `tokens` more, after their parity is shown.

    `weights` is fp32, bf16, fp16, int8 or int4, by default the checkpoint's own; `all` adds torch.compile. Raises
    BadInput for what cannot be used.
    """
    tell = progress or (lambda *_: None)
    tell("loading", 0, 1)
    original, loss = _original(model, against), _loss(model) or (weights if weights in BITS else None)
    loaded, ids, name = _load(original, weights, revision, trust_remote_code, prompt + tokens)
    stored = weights or loss or _name_of(loaded)
    make = compile or _engine
    options = {"device": "cpu", "max_length": prompt + tokens + 1, "max_batch": 1}
    ours = Ours(make(model, **options, weights=weights))
    eager = Eager(loaded)
    tell("checking parity", 0, 1)
    if loss is None:
        parity = _parity(eager, ours, loaded, ids, prompt, tokens, stored)
    else:
        noises = (Ours(make(original, **options, weights=noise)) for noise in _noises(loss))
        parity = _bounded(eager, ours, noises, ids, prompt, tokens, loss)
    here = machines.measured() or machines.measure(lambda what: tell(what, 0, 1))
    apart = ours.engine.explain()
    name = name if against is None else str(model)
    result = Bench(name, stored, prompt, tokens, parity, here, apart=apart, environment=environment())
    result.plans = _plans(model, loaded)
    if not parity.passed:
        return result
    runners: dict[str, Runner] = {"transformers": eager, "taut": ours}
    if all:
        _add_compiled(runners, result, loaded, ids, prompt, tokens)
    seconds = _interleaved(runners, ids, prompt, tokens, rounds, result, tell)
    _fill(result, loaded, seconds)
    result.layers = _layers(ours, eager, ids, prompt)
    return result


def _noises(loss: str) -> Iterator[Any]:
    from taut.runtime.compiling import noisy

    return (noisy(loss, seed) for seed in range(DRAWS))


def _original(model: Any, against: Any) -> Any:
    """What is timed beside taut. Raises BadInput for a model in taut form alone: transformers cannot load it."""
    if against is None and _record(model).get("form") == "taut":
        cause = f"{model} is in taut form, and does not hold the model that it is compared with"
        raise BadInput(cause, "name the original: --against MODEL")
    return model if against is None else against


def _loss(model: Any) -> str | None:
    """The format in which a checkpoint in taut form keeps its weights; the less accurate one of two."""
    applied = {step["rewrite"] for step in _record(model).get("steps", ())}
    return next((name for name in reversed(BITS) if f"{name}_weights" in applied), None)


def _record(model: Any) -> dict[str, Any]:
    """The plan that a checkpoint was rewritten by; empty for none, and for a module."""
    if isinstance(model, nn.Module):
        return {}
    return (open_checkpoint(model).prior.record or {}).get("plan") or {}


def _plans(model: Any, original: nn.Module) -> list[Plan]:
    """The plan that the checkpoint was rewritten by, and what was done to the decoding step when it was compiled."""
    from taut.lift import lift
    from taut.runtime.compiling import module_step
    from taut.runtime.prepare import fuse, tidied

    record = _record(model)
    written = [Plan.from_dict(record)] if record else []
    try:
        return [*written, fuse(lift(tidied(module_step(original, POSITIONS))))[1]]
    except BadInput:
        return written


def _layers(ours: Ours, eager: Eager, ids: list[int], prompt: int) -> list[Layer]:
    """Where the time of a decoding step goes; nothing where the engine is none of taut's own on a CPU."""
    from taut.layers import layers
    from taut.runtime.engine import Engine as Own

    if not isinstance(ours.engine, Own):
        return []
    eager.prefill(ids[:prompt])
    return layers(ours.engine, eager.model, lambda: eager.step(ids[prompt]), prompt)


def _engine(model: Any, **options: Any) -> Engine:
    import taut

    make: Any = getattr(taut, "compile", None)
    if make is None:
        raise BadInput("this taut has no runtime", "install one that has taut.compile")
    return make(model, **options)


def _load(
    model: Any, weights: str | None, revision: str | None, remote: bool, length: int
) -> tuple[Any, list[int], str]:
    """The model in transformers, token ids of a text (random ones where there is no tokenizer), and its name."""
    if weights is not None and weights not in STORED:
        raise BadInput(f"there are no weights {weights!r}", f"name one of {', '.join(STORED)}")
    dtype = DTYPES.get(weights or "")
    if isinstance(model, nn.Module):
        loaded: Any = model if dtype is None else model.to(dtype)
        return loaded.eval(), _ids(None, loaded, length), type(model).__name__
    from taut.opened import open_model

    opened = open_model(model, revision, remote)
    kind: Any = opened.model_class
    loaded = kind.from_pretrained(opened.checkpoint.path, dtype=dtype or opened.dtype).eval()
    return loaded, _ids(opened.checkpoint.path, loaded, length), str(model)


def _ids(path: Path | None, model: Any, length: int) -> list[int]:
    window = getattr(model.config, "max_position_embeddings", length)
    if length > window:
        raise BadInput(f"{length} tokens do not fit the model's window of {window}", "ask for fewer")
    text = None if path is None else _text(path)
    if text:
        return [text[i % len(text)] for i in range(length)]
    return torch.randint(model.config.vocab_size, (length,), generator=torch.Generator().manual_seed(0)).tolist()


def _text(path: Path) -> list[int] | None:
    """The held-out text that comes with taut, in the model's tokens; None for a checkpoint without a tokenizer."""
    from transformers import AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(path)
    except (OSError, ValueError, ImportError):
        return None
    return tokenizer((resources.files("taut") / "demo" / "heldout.txt").read_text())["input_ids"]


def _name_of(model: nn.Module) -> str:
    dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
    return next((name for name, known in DTYPES.items() if known == dtype), "fp32")


def _parity(
    eager: Eager, ours: Runner, model: nn.Module, ids: list[int], prompt: int, tokens: int, weights: str
) -> Parity:
    head = ids[:prompt]
    chosen, original = greedy(eager, head, tokens)
    found = forced(ours, head, chosen)
    exact = in_float64(model, head, chosen)
    return same_function(original, found, exact, DTYPES[weights], chosen if weights == "fp32" else None)


def _bounded(
    eager: Eager, ours: Runner, noises: Iterable[Runner], ids: list[int], prompt: int, tokens: int, loss: str
) -> Parity:
    """On a text, since the perplexity of what a model chooses itself says little."""
    head, text = ids[:prompt], ids[prompt : prompt + tokens]
    before, after = forced(eager, head, text), forced(ours, head, text)
    return bounded(f"{loss}_weights", before, after, [forced(noise, head, text) for noise in noises], text)


def _add_compiled(
    runners: dict[str, Runner], result: Bench, model: Any, ids: list[int], prompt: int, tokens: int
) -> None:
    """torch.compile where it can: what it cannot is said, and its logits are held to the same rule."""
    name = "torch.compile"
    try:
        compiled = Compiled(model, prompt + tokens + 1)
        chosen, original = greedy(Eager(model), ids[:prompt], tokens)
        found = forced(compiled, ids[:prompt], chosen)
    except Exception as error:
        result.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0][:200] if str(error) else ''}"
        return
    exact = in_float64(model, ids[:prompt], chosen)
    parity = same_function(original, found, exact, next(model.parameters()).dtype)
    if parity.passed:
        runners[name] = compiled
    else:
        result.failed[name] = f"not the same model: {parity.reason}"


def _interleaved(
    runners: dict[str, Runner], ids: list[int], prompt: int, tokens: int, rounds: int, result: Bench, tell: Progress
) -> dict[tuple[str, str], list[float]]:
    """Seconds by runner and workload; a decode step's are the median of its round. The bandwidth is this run's best."""
    seconds: dict[tuple[str, str], list[float]] = {}
    best = 0.0
    size = machines.read_size()
    for number in range(rounds + 1):
        tell("timing", number, rounds + 1)
        probe = machines.read_bandwidth(size, seconds=0.05)
        best = max(best, probe.value)
        for name, runner in runners.items():
            whole, steps = _once(runner, ids, prompt, tokens)
            if number:  # the first round warms up
                seconds.setdefault((name, "prefill"), []).append(whole)
                seconds.setdefault((name, "decode"), []).append(steps)
    figure = Figure(best, machines.MEASURED, f"best of {rounds + 1} reads of {size / 2**20:.0f} MiB in this run")
    result.machine = replace(result.machine, bandwidths=result.machine.bandwidths | {"memory": figure})
    return seconds


def _once(runner: Runner, ids: list[int], prompt: int, tokens: int) -> tuple[float, float]:
    start = time.perf_counter()
    runner.prefill(ids[:prompt])
    whole = time.perf_counter() - start
    steps = []
    for token in ids[prompt : prompt + tokens]:
        start = time.perf_counter()
        runner.step(token)
        steps.append(time.perf_counter() - start)
    return whole, median(steps)


def _fill(result: Bench, model: nn.Module, seconds: dict[tuple[str, str], list[float]]) -> None:
    own = _name_of(model)
    works = {}
    for found in _costs(model, result.prompt, result.tokens):
        result.costs.append(found)
        for weights in {own, result.weights}:
            works[found.workload.name, weights] = _work(found, STORED[weights] / STORED[own]), found
    for (name, workload), times in seconds.items():
        work, found = works[workload, result.weights if name == "taut" else own]
        floor = max(
            work.bytes / result.machine.bandwidths["memory"].value,
            sum(item.computing(result.machine) for item in found.items),
        )
        middle = median(times)
        result.rows.append(Timed(name, workload, middle, min(times), work.bytes, work.flops, middle / floor))


def _costs(model: nn.Module, prompt: int, tokens: int) -> Iterator[Cost]:
    from taut.lift import lift
    from taut.module import graph_of

    graph = lift(graph_of(model, None, "logits"))
    yield cost(graph, Workload("prefill", length=prompt), decodes=True)
    yield cost(graph, Workload("decode", length=1, context=prompt + tokens // 2), decodes=True)


def _work(found: Cost, shrunk: float) -> Work:
    """Weights in another format take `shrunk` times their bytes; the cache stays."""
    cache = sum(item.held for item in found.items if item.kind == "attention")
    held = sum(item.held for item in found.items) - cache
    return Work(found.work.flops, shrunk * held + cache + found.ends)


def environment() -> dict[str, Any]:
    """What a number depends on."""
    versions = {name: version(name) for name in ("taut", "torch", "transformers", "numba")}
    where = {"cpu": machines.cpu_name(), "threads": torch.get_num_threads(), "system": platform.system()}
    when = datetime.now(UTC).isoformat(timespec="minutes")
    return versions | where | {"python": platform.python_version(), "time": when}
