"""A prepared step graph on disk, so that the second start neither imports a model's code nor exports it.

One safetensors file: the graph as JSON in its metadata, beside the tables that no checkpoint holds. Weights are not
in it; they are read from the checkpoint by the names that stand in it.
"""

from __future__ import annotations

import importlib
import json
import operator
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx

from taut.checkpoint.probe import Piece
from taut.coded import Decoded, Turned
from taut.graph import Graph
from taut.op import Op
from taut.sources import digest
from taut.user_cache import user_cache
from taut.values import Filled, Original, Stacked, Value, originals
from taut.whole_file import whole_file

NAMESPACES = ("aten", "prims")


class CannotSave(Exception):
    """The graph holds something that has no form on disk; the message says what."""


@dataclass(frozen=True)
class Place:
    """Where on disk a parameter of some shape lies."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


@dataclass(frozen=True)
class Stored:
    """A prepared graph, and where each of the parameters lies that it is made from."""

    graph: Graph
    places: Mapping[str, Place]


def folder() -> Path:
    """Where prepared graphs are kept."""
    return user_cache("steps")


def key(*parts: Any) -> str:
    """A name for what depends on these parts and on what makes it."""
    from importlib.metadata import version

    versions = digest("**/*.py"), torch.__version__, version("transformers")
    return sha256(json.dumps([versions, parts], default=str, sort_keys=True).encode()).hexdigest()[:24]


def save(stored: Stored, path: Path) -> None:
    """Write a graph; the file is there whole or not at all. Raises CannotSave, and OSError."""
    from safetensors.torch import save_file

    graph = stored.graph
    record = {
        "nodes": [_node(node) for node in graph.nodes],
        "values": {name: _value(value) for name, value in graph.values.items()},
        "written": graph.written,
        "outputs": list(graph.outputs),
        "places": {name: _place(place) for name, place in stored.places.items()},
    }
    tensors = {name: graph.tensors[name].clone().contiguous() for name in graph.placeholders("buffer")}
    path.parent.mkdir(parents=True, exist_ok=True)
    with whole_file(path) as part:
        save_file(tensors, part, {"graph": json.dumps(record)})


def load(path: Path) -> Stored | None:
    """What was saved; None where there is nothing, or nothing that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt") as file:
            record = json.loads(file.metadata()["graph"])
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        return Stored(_graph(record, tensors), {name: _placed(place) for name, place in record["places"].items()})
    except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError, ImportError):
        return None


def parameters(graph: Graph) -> set[str]:
    """The parameters that a graph is computed from."""
    return {name for value in graph.values.values() for name in originals(value)}


# Places


def _place(place: Place) -> Any:
    box = lambda slices: [[part.start, part.stop] for part in slices]  # noqa: E731
    pieces = [[piece.tensor, box(piece.inside), box(piece.part), list(piece.axes)] for piece in place.pieces]
    return {"shape": list(place.shape), "pieces": pieces}


def _placed(record: Any) -> Place:
    box = lambda ends: tuple(slice(start, stop) for start, stop in ends)  # noqa: E731
    pieces = (Piece(name, box(inside), box(part), tuple(axes)) for name, inside, part, axes in record["pieces"])
    return Place(tuple(record["shape"]), tuple(pieces))


# Nodes


def _node(node: fx.Node) -> dict[str, Any]:
    kept = {name: node.meta[name] for name in ("kind", "tensor", "where") if name in node.meta}
    record = {"name": node.name, "op": node.op, "meta": kept, "val": _shape(node.meta.get("val"))}
    if node.op == "placeholder":
        return record
    if node.op == "call_function":
        record["target"] = _target(node.target)
    return record | {"args": _plain(node.args), "kwargs": _plain(dict(node.kwargs))}


def _target(target: Any) -> str:
    if target is operator.getitem:
        return "getitem"
    if isinstance(target, Op):
        return f"taut.{target.reference.__module__}.{target.name}"
    if isinstance(target, torch._ops.OpOverload) and target.namespace in NAMESPACES:
        return f"torch.{target.namespace}.{target._opname}.{target._overloadname}"
    raise CannotSave(f"it calls {target}")


def _found(name: str) -> Any:
    kind, _, rest = name.partition(".")
    if kind == "getitem":
        return operator.getitem
    if kind == "taut":
        module, _, attribute = rest.rpartition(".")
        if not module.startswith("taut.ops."):
            raise ValueError(name)
        return getattr(importlib.import_module(module), attribute)
    namespace, op, overload = rest.split(".")
    return getattr(getattr(getattr(torch.ops, namespace), op), overload)


NAMED: dict[type, Callable[[Any], str]] = {
    torch.dtype: lambda value: str(value).removeprefix("torch."),
    torch.layout: lambda value: str(value).removeprefix("torch."),
    torch.memory_format: lambda value: str(value).removeprefix("torch."),
    torch.device: str,
    fx.Node: lambda value: value.name,
}


def _plain(value: Any) -> Any:
    """Arguments as JSON; what JSON does not know is an object with one key, its kind."""
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list):
        return [_plain(v) for v in value]
    if isinstance(value, tuple):
        return {"tuple": [_plain(v) for v in value]}
    if isinstance(value, dict):
        return {"dict": [[k, _plain(v)] for k, v in value.items()]}
    for kind, name in NAMED.items():
        if isinstance(value, kind):
            return {kind.__name__: name(value)}
    raise CannotSave(f"it holds a {type(value).__name__}")


def _revived(value: Any, nodes: Mapping[str, fx.Node]) -> Any:
    if isinstance(value, list):
        return [_revived(v, nodes) for v in value]
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    match kind:
        case "tuple":
            return tuple(_revived(v, nodes) for v in inner)
        case "dict":
            return {k: _revived(v, nodes) for k, v in inner}
        case "Node":
            return nodes[inner]
        case "device":
            return torch.device(inner)
    return getattr(torch, inner)


def _shape(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"shape": list(value.shape), "dtype": str(value.dtype).removeprefix("torch.")}
    return [_shape(v) for v in value] if isinstance(value, list | tuple) else None


def _meta(record: Any) -> Any:
    if isinstance(record, list):
        return [_meta(v) for v in record]
    if record is None:
        return None
    return torch.empty(record["shape"], dtype=getattr(torch, record["dtype"]), device="meta")


def _value(value: Value) -> Any:
    if isinstance(value, Original):
        return value.name
    if isinstance(value, Stacked):
        return {"parts": [_value(part) for part in value.parts], "heights": list(value.heights)}
    if isinstance(value, Decoded):
        return {"codes": _value(value.codes), "scale": _value(value.scale), "bits": value.bits}
    if isinstance(value, Turned):
        return {"turned": _value(value.x)}
    if isinstance(value, Filled):
        return {"shape": list(value.shape), "value": value.value}
    raise CannotSave(f"a parameter has become a {type(value).__name__}")


def _expression(record: Any) -> Value:
    if isinstance(record, str):
        return Original(record)
    if "codes" in record:
        return Decoded(_expression(record["codes"]), _expression(record["scale"]), record["bits"])
    if "turned" in record:
        return Turned(_expression(record["turned"]))
    if "value" in record:
        return Filled(tuple(record["shape"]), record["value"])
    return Stacked(tuple(_expression(part) for part in record["parts"]), tuple(record["heights"]))


def _graph(record: dict[str, Any], tensors: dict[str, Tensor]) -> Graph:
    made, nodes = fx.Graph(), {}
    for entry in record["nodes"]:
        node = _made(made, entry, nodes)
        node.meta = entry["meta"] | {"val": _meta(entry["val"]), "line": ""}
        nodes[entry["name"]] = node
    values = {name: _expression(value) for name, value in record["values"].items()}
    return Graph(made, tensors, values, {}, tuple(record["outputs"]), record["written"])


def _made(graph: fx.Graph, entry: dict[str, Any], nodes: Mapping[str, fx.Node]) -> fx.Node:
    if entry["op"] == "placeholder":
        return graph.placeholder(entry["name"])
    args, kwargs = _revived(entry["args"], nodes), _revived(entry["kwargs"], nodes)
    if entry["op"] == "output":
        return graph.output(args[0])
    return graph.create_node("call_function", _found(entry["target"]), args, kwargs, entry["name"])
