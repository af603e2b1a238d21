"""A checkpoint as a model: its class, its configuration, and its graph from shapes alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint import BadInput, Checkpoint, open_checkpoint
from taut.checkpoint.names import Piece, locate
from taut.graph import Graph
from taut.shrink import build_on_meta, example_inputs
from taut.tracing import CannotTrace, trace


@dataclass
class Opened:
    """An opened checkpoint. `untied` gives its head a tensor of its own."""

    checkpoint: Checkpoint
    config: Any
    model_class: type[nn.Module]
    untied: bool = False
    graphs: dict[str, Graph] = field(default_factory=dict)

    @cached_property
    def meta(self) -> nn.Module:
        """The model without weights, on the meta device."""
        return build_on_meta(self.model_class, self.config)

    @cached_property
    def pieces(self) -> dict[str, list[Piece]]:
        """Where on disk each parameter lies.

        Raises BadInput for missing tensors and wrong shapes.
        """
        return locate(self.meta, self.checkpoint)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that most of the weights have."""
        bytes_of: dict[torch.dtype, int] = {}
        for info in self.checkpoint.tensors.values():
            if info.dtype.is_floating_point:
                bytes_of[info.dtype] = bytes_of.get(info.dtype, 0) + info.nbytes
        return max(bytes_of, key=bytes_of.__getitem__, default=torch.float32)

    def graph(self, outputs: str) -> Graph:
        """The exported graph, from shapes alone. Raises BadInput where the model cannot be traced."""
        if outputs not in self.graphs:
            try:
                self.graphs[outputs] = trace(self.meta, example_inputs(self.meta), outputs=outputs)
            except CannotTrace as error:
                raise BadInput(
                    f"{self.model_class.__name__} cannot be exported: {error}",
                    "report the class and this message; nothing was changed",
                ) from error
        return self.graphs[outputs]


def open_model(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False, untie: bool = False
) -> Opened:
    """Open a directory or a hub id. Raises BadInput with the cause and the cure."""
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    config = checkpoint.hf_config()
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
    known = transformers.AutoModel._model_mapping
    if type(config) in known:
        found = known[type(config)]
        return found[0] if isinstance(found, tuple) else found
    named = ", ".join(getattr(config, "architectures", None) or ("none",))
    raise BadInput(
        f"{checkpoint.path}: the installed transformers has no model class for architectures: {named}",
        "update transformers, or add `architectures` to config.json",
    )


def _remote_class(checkpoint: Checkpoint) -> type[nn.Module]:
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    autos = {k: v for k, v in checkpoint.config["auto_map"].items() if k.startswith("AutoModel")}
    if not autos:
        raise BadInput(f"{checkpoint.path}: auto_map names no model class", "add one to config.json")
    reference = next(iter(autos.values()))
    return get_class_from_dynamic_module(reference, str(checkpoint.path))
