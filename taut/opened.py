"""A checkpoint as a model: its class, its configuration, and its graph, from shapes alone or with tensors read late."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint import BadInput, Checkpoint, open_checkpoint
from taut.checkpoint.names import Located, locate
from taut.graph import Graph
from taut.shrink import build_on_meta, example_inputs
from taut.shrink.weights import cast_weights
from taut.tracing import CannotTrace, trace


@dataclass
class Opened:
    """An opened checkpoint. `untied` gives its head a tensor of its own; `refused` parameters must stay as they are."""

    checkpoint: Checkpoint
    config: Any
    model_class: type[nn.Module]
    untied: bool = False
    refused: dict[str, str] = field(default_factory=dict)

    @cached_property
    def meta(self) -> nn.Module:
        """The model without weights, on the meta device."""
        return build_on_meta(self.model_class, self.config).eval()

    @cached_property
    def located(self) -> Located:
        """Where on disk each parameter lies. Raises BadInput for missing tensors and wrong shapes."""
        return locate(self.meta, self.checkpoint, untied=self.untied)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have; the scales of codes are none."""
        bytes_of: dict[torch.dtype, int] = {}
        stored = self.checkpoint.tensors
        for name, info in stored.items():
            if info.dtype.is_floating_point and f"{name.removesuffix('.scale')}.codes" not in stored:
                bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
        configured = getattr(self.config, "dtype", None)
        return max(bytes_of, key=bytes_of.__getitem__, default=configured or torch.float32)

    def graph(self, outputs: str) -> Graph:
        """The graph from shapes alone. Raises BadInput where the model cannot be traced."""
        return self._trace(self.meta, outputs)

    def writable_graph(self, outputs: str, known: bool = True) -> Graph:
        """The graph from shapes alone, with what the layout on disk, if there is one, does not allow to be changed.

        `known`: a plan made from it may look at what small parameters hold, so as not to do again what is done.
        """
        graph = self.graph(outputs)
        if not self.checkpoint.shards:
            return graph
        graph.unwritable = lambda name, axes: self.refused.get(name) or self.located.unwritable(name, axes)
        graph.stored = self._stored if known else None
        return graph

    def _stored(self, name: str, rows: slice | None) -> Tensor:
        return self.located.read(name, rows)

    def full_graph(
        self,
        outputs: str,
        dtype: torch.dtype | None = None,
        symbolic: bool = False,
        example: Mapping[str, Tensor] | None = None,
    ) -> Graph:
        """The graph that can be run: parameters are read from disk when they are needed, and not kept.

        It takes inputs of the shapes of the example, by default of those that `inputs` makes up.
        """
        model = cast_weights(build_on_meta(self.model_class, self.config).eval(), dtype or self.dtype)
        graph = self._trace(model, outputs, symbolic, example)
        tensors = dict(graph.tensors)
        for name, buffer in self.buffers().items():
            tensors[name] = buffer
        lost = [n for n, node in graph.placeholders("buffer").items() if tensors[n].is_meta and node.users]
        if lost:
            cause = f"the full model cannot be run: {', '.join(lost)} is made up while tracing"
            raise BadInput(cause, "leave --verify out")

        def read(name: str, rows: slice | None) -> Tensor:
            return self.located.read(name, rows).to(dtype or self.dtype)

        return Graph(graph.fx, tensors, graph.values, graph.ties, graph.outputs, graph.written, read)

    def read(self, name: str) -> Tensor:
        """A parameter as it stands on disk: taut form keeps the graph's own names."""
        if not self.in_taut_form:
            return self.located.read(name)
        if name not in self.checkpoint.tensors:
            raise BadInput(f"{self.checkpoint.path}: {name} is missing", "apply taut to the original again")
        return self.checkpoint.read(name)

    @property
    def in_taut_form(self) -> bool:
        return _in_taut_form(self.checkpoint)

    def inputs(self, seed: int = 0) -> dict[str, Tensor]:
        """Made-up inputs on the CPU."""
        return example_inputs(self.meta, seed=seed, device="cpu")

    def buffers(self) -> Mapping[str, Tensor]:
        """The model's buffers: as stored, else as its code makes them."""
        with _parameters_on_meta():
            model = self.model_class(self.config)
        buffers = dict(model.named_buffers(remove_duplicate=False))
        stored = self.checkpoint.tensors if self.in_taut_form else self.located
        return buffers | {name: self.read(name) for name in buffers if stored.get(name)}

    def _trace(
        self, model: nn.Module, outputs: str, symbolic: bool = False, example: Mapping[str, Tensor] | None = None
    ) -> Graph:
        made = example_inputs(model) if example is None else {name: t.to("meta") for name, t in example.items()}
        try:
            return trace(model, made, outputs=outputs, symbolic=symbolic)
        except CannotTrace as error:
            cause = f"{self.model_class.__name__} cannot be exported: {error}"
            raise BadInput(cause, "report the class and this message; nothing was changed") from error


def _in_taut_form(checkpoint: Checkpoint) -> bool:
    plan = (checkpoint.prior.record or {}).get("plan")
    return isinstance(plan, dict) and plan.get("form") == "taut"


@contextlib.contextmanager
def _parameters_on_meta() -> Iterator[None]:
    """Inside, modules keep real buffers and get parameters without storage: rotary tables without gigabytes."""
    register = nn.Module.register_parameter

    def on_meta(module: nn.Module, name: str, parameter: nn.Parameter | None) -> None:
        if parameter is not None:
            parameter = nn.Parameter(parameter.to("meta"), requires_grad=parameter.requires_grad)
        register(module, name, parameter)

    kind: Any = nn.Module
    kind.register_parameter = on_meta
    try:
        yield
    finally:
        kind.register_parameter = register


def open_model(
    model: str | Path,
    revision: str | None = None,
    trust_remote_code: bool = False,
    untie: bool = False,
    weights: bool = True,
) -> Opened:
    """Open a directory or a hub id; with `weights=False` a configuration is enough.

    Raises BadInput with the cause and the cure.
    """
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code, weights=weights)
    config = checkpoint.hf_config()
    untie = untie or (_in_taut_form(checkpoint) and bool((checkpoint.prior.record or {}).get("untied")))
    if untie:
        config.tie_word_embeddings = False
    return Opened(checkpoint, config, model_class(checkpoint, config), untie)


def model_class(checkpoint: Checkpoint, config: Any) -> type[nn.Module]:
    """The class that the configuration names, or the base class of its model type."""
    import transformers

    for name in getattr(config, "architectures", None) or ():
        found = getattr(transformers, name, None)
        if isinstance(found, type):
            return found
    if checkpoint.config.get("auto_map"):
        return _remote_class(checkpoint)
    known: Any = transformers.AutoModel._model_mapping
    if type(config) in known:
        found = known[type(config)]
        return found[0] if isinstance(found, tuple) else found
    named = ", ".join(getattr(config, "architectures", None) or ("none",))
    raise BadInput(
        f"{checkpoint.path}: the installed transformers has no model class for architectures: {named}",
        "update transformers, or correct `architectures` in config.json",
    )


def _remote_class(checkpoint: Checkpoint) -> type[nn.Module]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    autos = {k: v for k, v in checkpoint.config["auto_map"].items() if k.startswith("AutoModel")}
    if not autos:
        raise BadInput(f"{checkpoint.path}: auto_map names no model class", "add one to config.json")
    return get_class_from_dynamic_module(next(iter(autos.values())), str(checkpoint.path))
