"""The step graph of a checkpoint: exported once from its configuration and kept, with parameters read when needed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint import Checkpoint, open_checkpoint
from taut.checkpoint.names import assemble
from taut.checkpoint.probe import Piece, whole
from taut.graph import Graph
from taut.machine import Progress
from taut.runtime import saved
from taut.runtime.exporting import bind, step_graph, stop_tokens, window


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
    """What the graph and its tables depend on: configuration, plan, and the files, which may hold buffers."""
    files = [(str(s.path.resolve()), s.path.stat().st_size, s.path.stat().st_mtime_ns) for s in checkpoint.shards]
    config, plan = (checkpoint.path / "config.json").read_text(), (checkpoint.prior.record or {}).get("plan")
    return saved.key(config, plan, files, max_length, checkpoint.trust_remote_code)


def _reader(checkpoint: Checkpoint, places: Mapping[str, saved.Place]) -> Any:
    def read(name: str, rows: slice | None) -> Tensor:
        return assemble(checkpoint, places[name].pieces, places[name].shape, rows)

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
    from taut.runtime.replay import replayed
    from taut.shrink.weights import cast_weights
    from taut.tautform import plan_of

    opened = open_model(model, revision, trust_remote_code)
    plan = plan_of(opened) if opened.in_taut_form else None
    tell("exporting the step")
    graph = step_graph(cast_weights(opened.meta, torch.float32), window(opened.config, max_length))
    bind(graph, dict(opened.buffers()))
    tell("fusing")
    if plan is None:
        graph = prepared(graph)
        graph.read = opened.located.read
        places = {name: _place(opened, name) for name in saved.parameters(graph)}
    else:
        graph = prepared(graph, partial(replayed, plan=plan, stored=opened.checkpoint.tensors))
        graph.read = opened.checkpoint.read
        shapes = {name: opened.checkpoint.tensors[name].shape for name in saved.parameters(graph)}
        places = {name: saved.Place(size, (whole(name, size),)) for name, size in shapes.items()}
    known = {name: place for name, place in places.items() if place is not None}
    made = saved.Stored(graph, known)
    if len(known) == len(places):
        _keep(made, place)
    return made


def _place(opened: Any, name: str) -> saved.Place | None:
    """Where a parameter lies; None where its elements lie there in no simple order."""
    pieces: tuple[Piece, ...] = tuple(opened.located.get(name, ()))
    simple = bool(pieces) and all(piece.in_order for piece in pieces)
    return saved.Place(tuple(opened.located.shapes[name]), pieces) if simple else None


def _keep(made: saved.Stored, place: Path) -> None:
    """Save for the next start; a folder that cannot be written only costs time then."""
    try:
        saved.save(made, place)
    except (saved.CannotSave, OSError):
        place.unlink(missing_ok=True)


def _json(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.is_file() else {}
