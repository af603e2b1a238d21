"""One run: parity, then prefill and decode timed apart, all runners in turn in each round, beside a read of memory,
since a machine's speed changes under one's feet. On a GPU every call is timed until the device has done it.
"""

from __future__ import annotations

import platform
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from datetime import UTC, datetime
from functools import partial
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from taut import machine as machines
from taut.benchmark.results import Bench, Timed
from taut.benchmark.runners import Compiled, Eager, Engine, Ours
from taut.checkpoint import BadInput, open_checkpoint
from taut.coded import BITS, DTYPES
from taut.cost import Cost, Workload, cost
from taut.lossy import DRAWS
from taut.machine import Figure
from taut.on_disk import Progress
from taut.op import Work
from taut.parity import Parity, Runner, bounded, forced, greedy, in_float64, same_function
from taut.plans import Plan
from taut.runtime.placed import ON_CPU, gpu

if TYPE_CHECKING:
    from taut.layers import Layer
    from taut.runtime.engine import Engine as Own

STORED = {"fp32": 4.0, "fp16": 2.0, "bf16": 2.0, "int8": 1.0, "int4": 0.5 + 2 / 32}
"""Bytes of a weight as it lies in memory; int4 has a scale of two bytes a group of 32."""
POSITIONS = 16
"""What is done to a decoding step does not depend on how many there are."""


def bench(
    model: str | Path | nn.Module,
    *,
    device: str = "cpu",
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

    Both run on `device`, "cpu" or "cuda", to which a module is moved. `weights` is fp32, bf16, fp16, int8 or int4, by
    default the checkpoint's own; `all` adds torch.compile. Raises BadInput for what cannot be used.
    """
    if device != "cpu":
        gpu(device)
    tell = progress or (lambda *_: None)
    tell("loading", 0, 1)
    original, loss = _original(model, against), _loss(model) or (weights if weights in BITS else None)
    loaded, ids, name = _load(original, weights, revision, trust_remote_code, prompt + tokens)
    stored, name = weights or loss or _name_of(loaded), name if against is None else str(model)
    costs, plans = list(_costs(loaded, prompt, tokens)), _plans(model, loaded)
    with _enough_memory():
        eager = Eager(loaded.to(device))
        make = compile or _engine
        options = {"device": device, "max_length": prompt + tokens + 1, "max_batch": 1}
        ours = Ours(make(model, **options, weights=weights))
        tell("checking parity", 0, 1)
        if loss is None:
            parity = _parity(eager, ours, loaded, ids, prompt, tokens, stored)
        else:
            noises = (Ours(make(original, **options, weights=noise)) for noise in _noises(loss))
            parity = _bounded(eager, ours, noises, ids, prompt, tokens, loss)
        here = machines.measured(device) or machines.measure(lambda what: tell(what, 0, 1), device)
        shown = {"apart": ours.engine.explain(), "environment": environment(device), "costs": costs, "plans": plans}
        shown["compression"] = _compression(ours)
        result = Bench(name, stored, prompt, tokens, parity, here, **shown)
        if not parity.passed:
            return result
        runners: dict[str, Runner] = {"transformers": eager, "taut": ours}
        if all:
            _add_compiled(runners, result, loaded, ids, prompt, tokens)
        seconds = _interleaved(runners, ids, prompt, tokens, rounds, result, device, tell)
    _fill(result, _name_of(loaded), seconds)
    result.layers = _layers(ours, eager, ids, prompt)
    return result


@contextmanager
def _enough_memory() -> Iterator[None]:
    """Raises BadInput where the GPU runs out of memory: it holds the model twice, and for the proof once in float64."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        cause = f"the GPU's memory is too small to compare two engines: {str(error).splitlines()[0]}"
        raise BadInput(cause, f"take a smaller model, or {ON_CPU}") from error


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
    from taut.runtime.exporting import module_step
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

    own = _own(ours)
    if own is None or own.device.type != "cpu":
        return []
    eager.prefill(ids[:prompt])
    return layers(own, eager.model, lambda: eager.step(ids[prompt]), prompt)


def _own(ours: Ours) -> Own | None:
    """The engine, where it is taut's own."""
    from taut.runtime.engine import Engine as Own

    return ours.engine if isinstance(ours.engine, Own) else None


def _compression(ours: Ours) -> float:
    own = _own(ours)
    return 1.0 if own is None else own.compression


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
    runners: dict[str, Runner], ids: list[int], prompt: int, tokens: int, rounds: int, result: Bench, device: str,
    tell: Progress,
) -> dict[tuple[str, str], list[float]]:  # fmt: skip
    """Seconds by runner and workload; a decode step's are the median of its round. The bandwidth is this run's best."""
    seconds: dict[tuple[str, str], list[float]] = {}
    best = 0.0
    size = machines.read_size(device)
    done = (lambda: None) if device == "cpu" else partial(torch.cuda.synchronize, device)
    for number in range(rounds + 1):
        tell("timing", number, rounds + 1)
        probe = machines.read_bandwidth(size, seconds=0.05, device=device)
        best = max(best, probe.value)
        for name, runner in runners.items():
            whole, steps = _once(runner, ids, prompt, tokens, done)
            if number:  # the first round warms up
                seconds.setdefault((name, "prefill"), []).append(whole)
                seconds.setdefault((name, "decode"), []).append(steps)
    figure = Figure(best, machines.MEASURED, f"best of {rounds + 1} reads of {size / 2**20:.0f} MiB in this run")
    result.machine = replace(result.machine, bandwidths=result.machine.bandwidths | {"memory": figure})
    return seconds


def _once(runner: Runner, ids: list[int], prompt: int, tokens: int, done: Callable[[], None]) -> tuple[float, float]:
    """Seconds of the prompt and of a step; `done` waits until the device is."""
    done()
    start = time.perf_counter()
    runner.prefill(ids[:prompt])
    done()
    whole = time.perf_counter() - start
    steps = []
    for token in ids[prompt : prompt + tokens]:
        start = time.perf_counter()
        runner.step(token)
        done()
        steps.append(time.perf_counter() - start)
    return whole, median(steps)


def _fill(result: Bench, own: str, seconds: dict[tuple[str, str], list[float]]) -> None:
    """A row for every runner and workload; `own` names the weights of the original."""
    found_by = {found.workload.name: found for found in result.costs}
    for (name, workload), times in seconds.items():
        found, shrunk = found_by[workload], 1.0
        if name == "taut":
            shrunk = STORED[result.weights] / STORED[own] * (result.compression if workload == "decode" else 1.0)
        work = _work(found, shrunk)
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


def environment(device: str = "cpu") -> dict[str, Any]:
    """What a number depends on."""
    versions = {name: version(name) for name in ("taut", "torch", "transformers", "numba")}
    where = {"cpu": machines.cpu_name(), "threads": torch.get_num_threads(), "system": platform.system()}
    if device != "cpu":
        where |= {"gpu": torch.cuda.get_device_name(device), "cuda": torch.version.cuda, "triton": version("triton")}
    when = datetime.now(UTC).isoformat(timespec="minutes")
    return versions | where | {"python": platform.python_version(), "time": when}
