"""From a model to an engine: its step exported, prepared and lowered, its weights read when the program is made."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint.errors import BadInput
from taut.coded import BITS, with_noise
from taut.graph import Graph
from taut.ops._weights import GROUP, quantize
from taut.runtime.engine import Engine
from taut.runtime.lower import CannotLower, lower
from taut.runtime.parts import Convert
from taut.runtime.placed import gpu
from taut.runtime.steps import Weight

WINDOW = 2048
"""Positions that a slot has by default, where the model allows as many."""

WIDTHS = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
Progress = Callable[[str], None]


class CannotCompile(BadInput):
    """The model is sound, but its step cannot be exported or lowered."""


def compile(
    model: str | Path | nn.Module,
    device: str = "cpu",
    *,
    max_length: int | None = None,
    max_batch: int = 1,
    weights: str | Convert | None = None,
    cache_dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Compile a causal model into an engine that decodes at the speed of memory.

    `model` is a directory, a hub id or an nn.Module; `device` is "cpu" or "cuda". Weights stay as they are stored
    (`weights` None), or become "fp32", "bf16", "fp16" or, on a CPU, "int8" (a scale a row) or "int4" (groups of 32).
    Activations and caches are float32 on a CPU, of the weights' dtype on a GPU. Raises BadInput with the cause and the
    cure: for what is no model, a device that cannot be used, a step that cannot be exported or lowered, and what does
    not fit.
    """
    if device != "cpu":
        gpu(device)
    convert = converter(weights)
    tell = progress or (lambda what: None)
    if isinstance(model, nn.Module):
        graph, stop = _module_graph(model, max_length, device, tell)
    else:
        from taut.runtime.stored import checkpoint_graph

        graph, stop = checkpoint_graph(model, max_length, revision, trust_remote_code, tell)
    tell("reading weights")
    try:
        program = lower(graph, convert)
    except CannotLower as error:
        raise CannotCompile(f"the model's step cannot be lowered: {error}", "generate with transformers") from error
    engine = Engine(program, max_batch, cache_dtype, stop, device)
    tell("compiling the interpreter, which is kept" if device == "cpu" else "compiling kernels, which are kept")
    engine.prefill([0])
    engine.reset()
    return engine


def converter(weights: str | Convert | None) -> Convert:
    """How matrices are kept. Raises BadInput for an unknown name."""
    if weights is None:
        return Weight
    if not isinstance(weights, str):
        return weights
    if weights in WIDTHS:
        return lambda matrix: Weight(matrix.to(WIDTHS[weights]))
    if weights in BITS:
        return partial(_quantized, weights)
    raise BadInput(f"no weights {weights!r}", f"take one of {', '.join([*WIDTHS, *BITS])}")


def _quantized(weights: str, matrix: Tensor) -> Weight:
    if weights == "int4" and matrix.shape[1] % GROUP:
        raise BadInput(f"int4 weights need inputs in groups of {GROUP}, and a layer has {matrix.shape[1]}", "take int8")
    return Weight(*quantize(matrix, BITS[weights]))


def noisy(weights: str, seed: int) -> Convert:
    """Matrices in float32 with random noise of the accuracy that "int8" or "int4" has: what those are compared with."""
    generator = torch.Generator().manual_seed(seed)

    def convert(matrix: Tensor) -> Weight:
        fits = weights == "int8" or matrix.shape[1] % GROUP == 0
        return Weight(with_noise(matrix.float(), BITS[weights], generator) if fits else matrix)

    return convert


def window(config: Any, max_length: int | None) -> int:
    """Positions a slot. Raises BadInput for more than the model knows, and for less than one."""
    known = getattr(config.get_text_config(), "max_position_embeddings", None)
    known = known if isinstance(known, int) and known > 0 else None
    if max_length is None:
        return min(WINDOW, known or WINDOW)
    if max_length < 1 or (known is not None and max_length > known):
        raise BadInput(f"a window of {max_length}, where the model knows {known or 'some'} positions", "take fewer")
    return max_length


def stop_tokens(*sources: Any) -> frozenset[int]:
    """The tokens that end a text, from the first of the configurations that names some."""
    for source in sources:
        named = source.get("eos_token_id") if isinstance(source, dict) else getattr(source, "eos_token_id", None)
        if named is not None:
            return frozenset(named if isinstance(named, Iterable) else [named])
    return frozenset()


def step_graph(model: nn.Module, max_length: int) -> Graph:
    """The step as exported. Raises BadInput where it cannot be."""
    from taut.runtime.step import trace_step
    from taut.tracing import CannotTrace

    try:
        return trace_step(model, max_length)
    except CannotTrace as error:
        cause = f"the decoding step of {type(model).__name__} cannot be exported: {error}"
        raise CannotCompile(cause, "generate with transformers, and report the class and this message") from error


def _module_graph(
    model: nn.Module, max_length: int | None, device: str, tell: Progress
) -> tuple[Graph, frozenset[int]]:
    from taut.runtime.prepare import prepared

    tell("exporting the step")
    graph = module_step(model, max_length, device)
    tell("fusing")
    return prepared(graph), stop_tokens(getattr(model, "generation_config", None), getattr(model, "config", None))


def module_step(model: nn.Module, max_length: int | None, device: str = "cpu") -> Graph:
    """The step of a module as exported, with its own tensors. Raises BadInput where it has none."""
    config: Any = getattr(model, "config", None)
    if config is None or not hasattr(config, "get_text_config"):
        raise BadInput(f"{type(model).__name__} has no configuration", "pass a causal model of transformers")
    length = window(config, max_length)
    plain = all(p.dtype == torch.float32 and p.device.type == "cpu" for p in model.parameters())
    graph = step_graph(model if plain else _on_meta(model), length)
    if not plain:
        held = {name: _held(t.detach(), device) for name, t in model.named_parameters(remove_duplicate=False)}
        made = {name: t.detach().cpu() for name, t in model.named_buffers(remove_duplicate=False)}
        bind(graph, held | {name: t.float() if t.is_floating_point() else t for name, t in made.items()})
    return graph


def _held(tensor: Tensor, device: str) -> Tensor:
    """Where lowering reads a tensor: matrices stay on the GPU that decodes, all else goes to the CPU."""
    return tensor if tensor.ndim > 1 and tensor.device.type == torch.device(device).type else tensor.cpu()


def _on_meta(model: nn.Module) -> nn.Module:
    """The model in float32 without storage: what is traced."""
    memo: dict[int, Any] = {}
    for tensor in [*model.parameters(), *model.buffers()]:
        shaped = tensor.detach().to("meta", torch.float32 if tensor.is_floating_point() else tensor.dtype)
        memo[id(tensor)] = nn.Parameter(shaped, requires_grad=False) if isinstance(tensor, nn.Parameter) else shaped
    return copy.deepcopy(model, memo)


def bind(graph: Graph, tensors: dict[str, Tensor]) -> None:
    """Give a graph that was traced on the meta device its tensors. Raises BadInput for what was made up there."""
    graph.tensors = dict(graph.tensors) | tensors
    placed = graph.placeholders("buffer")
    lost = [name for name, node in placed.items() if graph.tensors[name].is_meta and node.users]
    if lost:
        raise BadInput(
            f"{', '.join(lost)} is made up while tracing", "pass the loaded model as an nn.Module in float32"
        )
