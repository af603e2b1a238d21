"""Taut form on disk: the original configuration, `taut.json`, and the tensors of the rewritten graph by its names.

There is no code and no pickle: loading traces the configuration on the meta device, replays the plan's structure and
binds the tensors.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint import BadInput, Copy, Edit, TensorInfo, write_taut
from taut.coded import Codes, Scales
from taut.graph import Graph, shape
from taut.lift import lift
from taut.module import GraphModule
from taut.opened import Opened, open_model
from taut.plans import BadPlan, Plan, follow
from taut.values import Original, Value


@dataclass(frozen=True)
class Computed:
    """A tensor of the rewritten graph, computed in row blocks from the checkpoint's parameters."""

    value: Value
    shape: tuple[int, ...]
    dtype: torch.dtype
    located: Any

    def block(self, read: Callable[..., Tensor], rows: slice) -> Tensor:
        return self.value.evaluate(self.located.read, rows if self.shape else None)


def write_graph(
    opened: Opened, out: Path, plan: Plan, graph: Graph, record: Mapping[str, Any], force: bool, progress: Any
) -> None:
    """Write a rewritten graph. Raises as `write_taut`."""
    placed = graph.placeholders("parameter")
    tensors: dict[str, Edit] = {name: _edit(opened, graph, name, shape(placed[name])) for name in sorted(graph.values)}
    stored = [name for name in graph.placeholders("buffer") if opened.located.get(name)]
    tensors |= {name: _edit(opened, graph, name, tuple(graph.tensors[name].shape)) for name in stored}
    write_taut(opened.checkpoint, out, tensors, record=record, force=force, progress=progress)


def _edit(opened: Opened, graph: Graph, name: str, size: tuple[int, ...]) -> Edit:
    pieces = opened.located.get(name) or []
    infos = [opened.checkpoint.tensors[piece.tensor] for piece in pieces]
    if graph.values.get(name, Original(name)) == Original(name) and len(pieces) == 1 and infos[0].shape == size:
        return Copy(pieces[0].tensor, infos[0])
    return Computed(graph.values.get(name, Original(name)), size, _dtype(opened, graph, name, infos), opened.located)


def _dtype(opened: Opened, graph: Graph, name: str, infos: Sequence[TensorInfo]) -> torch.dtype:
    """What is on disk keeps its dtype. Of what a rewrite adds, codes keep their own, and so do their scales."""
    if infos:
        return infos[0].dtype
    value = graph.values.get(name)
    return graph.dtype_of(name) if isinstance(value, Codes | Scales) else opened.dtype


def load(path: str | Path, trust_remote_code: bool = False) -> GraphModule:
    """A model in taut form, as a module that takes keyword tensors of any batch and length.

    Raises BadInput where the directory holds no model in taut form, or one that this taut cannot replay.
    """
    opened = open_model(path, None, trust_remote_code)
    plan = plan_of(opened)
    try:
        graph = follow(lift(opened.full_graph(plan.outputs, symbolic=True)), plan)
    except BadPlan as error:
        raise BadInput(f"{path}: {error}", "apply taut to the original again with this version") from error
    stored = opened.checkpoint.tensors
    expected = {name: node.meta["val"] for name, node in graph.placeholders("parameter").items()}
    wrong = [name for name, val in expected.items() if name not in stored or not _fits(stored[name], val)]
    if wrong:
        cause = f"{path}: missing, or of another shape or kind: {', '.join(wrong[:5])}"
        raise BadInput(cause, "apply taut to the original again")
    return GraphModule(graph, {name: opened.checkpoint.read(name) for name in graph.values})


def plan_of(opened: Opened) -> Plan:
    """The plan of a checkpoint in taut form. Raises BadInput for what is none, and for a plan that cannot be read."""
    path, record = opened.checkpoint.path, opened.checkpoint.prior.record or {}
    if not opened.in_taut_form:
        raise BadInput(f"{path}: not a model in taut form", "load a checkpoint in stock form with transformers")
    try:
        return Plan.from_dict(record["plan"])
    except BadPlan as error:
        raise BadInput(f"{path}: {error}", "apply taut to the original again") from error


def _fits(info: TensorInfo, val: Tensor) -> bool:
    """Whether a stored tensor has the shape that the graph expects; codes must have their own dtype."""
    same = info.dtype == val.dtype if not val.is_floating_point() else info.dtype.is_floating_point
    return info.shape == tuple(val.shape) and same
