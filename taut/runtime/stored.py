"""The step graph of a checkpoint: exported once from its configuration and kept, with parameters read when needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint import BadInput, Checkpoint, open_checkpoint
from taut.graph import Graph
from taut.runtime import saved
from taut.runtime.compiling import Progress, bind, step_graph, stop_tokens, window


def checkpoint_graph(
    model: str | Path, max_length: int | None, revision: str | None, trust_remote_code: bool, tell: Progress
) -> tuple[Graph, frozenset[int]]:
    """The prepared step and the tokens that end a text. Raises BadInput as `compile`."""
    tell("opening the checkpoint")
    checkpoint = open_checkpoint(model, revision=revision, trust_remote_code=trust_remote_code)
    place = saved.folder() / f"{_identity(checkpoint, max_length)}.safetensors"
    kept = saved.load(place)
    if kept is None:
        kept = _exported(model, max_length, revision, trust_remote_code, tell, place)
    graph = kept.graph
    if graph.read is None:
        graph.read = _reader(checkpoint, kept.places)
    return graph, stop_tokens(_json(checkpoint.path / "generation_config.json"), checkpoint.config)


def _identity(checkpoint: Checkpoint, max_length: int | None) -> str:
    """What the graph and its tables depend on: the configuration, and the files, which may hold buffers."""
    files = [(str(s.path.resolve()), s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in checkpoint.shards]
    return saved.key((checkpoint.path / "config.json").read_text(), files, max_length, checkpoint.trust_remote_code)


def _reader(checkpoint: Checkpoint, places: Mapping[str, str]) -> Any:
    def read(name: str, rows: slice | None) -> Tensor:
        return checkpoint.read(places[name], rows)

    return read


def _exported(
    model: str | Path,
    max_length: int | None,
    revision: str | None,
    trust_remote_code: bool,
    tell: Progress,
    place: Path,
) -> saved.Stored:
    from taut.opened import open_model
    from taut.runtime.prepare import prepared
    from taut.shrink.weights import cast_weights

    opened = open_model(model, revision, trust_remote_code)
    if opened.in_taut_form:
        cure = "compile the original or its stock form: the engine fuses by itself"
        raise BadInput(f"{opened.checkpoint.path}: a checkpoint in taut form cannot be compiled yet", cure)
    tell("exporting the step")
    graph = step_graph(cast_weights(opened.meta, torch.float32), window(opened.config, max_length))
    bind(graph, dict(opened.buffers()))
    tell("fusing")
    graph = prepared(graph)
    located: Any = opened.located

    def read(name: str, rows: slice | None) -> Tensor:
        return located.read(name, rows)

    graph.read = read
    places = {name: _whole(opened, name) for name in saved.parameters(graph)}
    whole = {name: tensor for name, tensor in places.items() if tensor is not None}
    made = saved.Stored(graph, whole)
    if len(whole) == len(places):
        _keep(made, place)
    return made


def _whole(opened: Any, name: str) -> str | None:
    """The checkpoint's tensor that is a parameter as it stands; None where it has to be put together."""
    pieces = opened.located.get(name) or []
    if len(pieces) != 1:
        return None
    size = opened.located.shapes[name]
    as_it_stands = pieces[0].axes == tuple(range(len(size)))
    return pieces[0].tensor if as_it_stands and opened.checkpoint.tensors[pieces[0].tensor].shape == size else None


def _keep(made: saved.Stored, place: Path) -> None:
    """Save for the next start; a folder that cannot be written only costs time then."""
    try:
        saved.save(made, place)
    except (saved.CannotSave, OSError):
        place.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
