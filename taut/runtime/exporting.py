"""The step of a model, exported: the graph that is prepared and lowered."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint.errors import BadInput
from taut.graph import Graph
from taut.machine import Progress

WINDOW = 2048
"""Positions that a slot has by default, where the model allows as many."""


class CannotCompile(BadInput):
    """The model is sound, but its step cannot be exported or lowered."""


def module_graph(model: nn.Module, max_length: int | None, device: str, tell: Progress) -> tuple[Graph, frozenset[int]]:
    """The prepared step of a module, and the tokens that end a text. Raises BadInput as `compile`."""
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
