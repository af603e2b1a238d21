"""The verbs, the same in Python and on the command line. A model is a directory, a hub id or an nn.Module."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint import BadInput
from taut.cost import costs, decodes
from taut.graph import Graph
from taut.inspection import Inspection, inspection
from taut.lift import lift
from taut.machine import choose as choose_machine
from taut.machine import measured
from taut.on_disk import Progress, apply_checkpoint, verify_checkpoints
from taut.plans import BadPlan, Plan, make_plan, plan_and_apply
from taut.proof import Evidence

Model = str | Path | nn.Module


def inspect(
    model: Model,
    *,
    outputs: str = "all",
    example: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    untie: bool = False,
    dtype: str | torch.dtype | None = None,
    machine: str | None = None,
) -> Inspection:
    """Find every site of every rewrite, from shapes alone: a configuration without weights will do.

    `dtype` is what bytes are counted in, by default the checkpoint's own. `machine` (see `taut machines`) is the one
    whose floors are told, by default this one if it has been measured. Raises BadInput for what is no model.
    """
    here = choose_machine(machine)
    if isinstance(model, nn.Module):
        from taut.module import graph_of

        graph = lift(graph_of(model, example, outputs))
        return inspection(type(model).__name__, model, graph, _dtype(dtype), here)
    from taut.opened import open_model

    opened = open_model(model, revision, trust_remote_code, untie, weights=False)
    graph = lift(opened.writable_graph(outputs))
    found = inspection(str(model), opened.meta, graph, _dtype(dtype) or opened.dtype, here)
    found.evidence = (opened.checkpoint.prior.record or {}).get("evidence")
    found.prior = opened.checkpoint.prior.marks | ({"taut": "rewritten"} if opened.checkpoint.prior.record else {})
    return found


def write_page(found: Inspection, path: Path, form: str = "taut") -> None:
    """Write what was inspected as one self-contained HTML page, with what a plan would change about it.

    Raises BadInput where the file cannot be written.
    """
    from taut.report import inspection_page
    from taut.whole_file import write_text

    made, after = plan_and_apply(found.graph, form)
    write_text(path, inspection_page(found, made, costs(after, found.step, found.dtype)))


def plan(
    model: Model,
    *,
    form: str = "stock",
    only: Iterable[str] | None = None,
    outputs: str = "all",
    example: Mapping[str, Tensor] | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    untie: bool = False,
    machine: str | None = None,
    measure: bool = False,
    progress: Progress | None = None,
) -> Plan:
    """The plan that `apply` would follow, with what each step saves on a machine, by default this one if measured.

    With `measure` each step is timed on this machine, and those that are slower are left out: on the engine that
    decodes, where the model has one, else on the graph. Raises BadInput or BadPlan.
    """
    here = choose_machine("this" if measure and machine is None else machine)
    if measure and here != measured():
        raise BadInput(f"{machine} is not the machine at hand", "leave out --machine, or --measure")
    if isinstance(model, nn.Module):
        from taut.module import graph_of, inputs_of

        inside, dtype, graph = model, None, lift(graph_of(model, example, outputs))
        runnable = lambda: (model, graph, inputs_of(model, example))  # noqa: E731
    else:
        from taut.opened import open_model

        opened = open_model(model, revision, trust_remote_code, untie, weights=measure)
        inside, dtype, graph = opened.meta, opened.dtype, lift(opened.writable_graph(outputs))
        runnable = lambda: (opened, lift(opened.full_graph(outputs)), opened.inputs())  # noqa: E731
    made = make_plan(graph, form, only, outputs)
    if here is None:
        return made
    from taut import prices

    made = prices.predict(graph, made, here, decodes(inside), dtype)
    return prices.keep_what_pays(_contest(*runnable(), form, decodes(inside)), made, progress) if measure else made


def _contest(model: Any, graph: Graph, inputs: Mapping[str, Tensor], form: str, decoder: bool) -> Any:
    """What a plan is timed on: the engine, else the graph, which says why."""
    from taut.prices import GraphContest

    if not decoder:
        return GraphContest(graph, inputs, form, "the model does not decode")
    from taut.runtime.contest import engine_contest

    try:
        return engine_contest(model, form)
    except BadInput as error:
        return GraphContest(graph, inputs, form, f"there is no engine: {error}")


def apply(
    model: Model,
    plan: Plan | None = None,
    example: Mapping[str, Tensor] | None = None,
    only: Iterable[str] | None = None,
    form: str = "stock",
    *,
    out: str | Path | None = None,
    outputs: str = "all",
    untie: bool = False,
    verify: bool = False,
    force: bool = False,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> Any:
    """Rewrite a model. An nn.Module gives a new module, a checkpoint is written to `out` and gives Applied.

    With `verify` it is proved on the full-size model too, and a lossy rewrite is measured on `text`, a file. Raises
    BadInput or BadPlan for what cannot be used, and NotProved (with the evidence) where the proof fails; then nothing
    is written.
    """
    if isinstance(model, nn.Module):
        from taut.module import apply_module

        return apply_module(model, plan, example, only, form, outputs)
    if out is None:
        raise ValueError("say where to write the rewritten checkpoint: out=DIR")
    if plan is not None and only:
        raise BadPlan("a plan says which rewrites to apply, and so does --only")
    from taut.opened import open_model

    opened = open_model(model, revision, trust_remote_code, untie)
    checked_in = _dtype(dtype)
    said = None if text is None else Path(text)
    return apply_checkpoint(opened, Path(out), plan, only, form, outputs, verify, force, checked_in, said, progress)


def verify(
    before: Model,
    after: Model,
    example: Mapping[str, Tensor] | None = None,
    *,
    revision: str | None = None,
    trust_remote_code: bool = False,
    dtype: str | torch.dtype | None = None,
    text: str | Path | None = None,
    progress: Progress | None = None,
) -> Evidence:
    """Is `after` still the same model as `before`: its recorded plan is replayed on `before` and proved.

    What a lossy rewrite costs is measured on `text`, a file, by default on the one that comes with taut.
    """
    if isinstance(before, nn.Module) and isinstance(after, nn.Module):
        from taut.module import verify_modules

        return verify_modules(before, after, example)
    if isinstance(before, nn.Module) or isinstance(after, nn.Module):
        raise TypeError("verify compares two modules or two checkpoints, not one of each")
    said = None if text is None else Path(text)
    return verify_checkpoints(before, after, revision, trust_remote_code, _dtype(dtype), said, progress)


def _dtype(given: str | torch.dtype | None) -> torch.dtype | None:
    """Raises BadInput for what is no dtype."""
    found = getattr(torch, given, given) if isinstance(given, str) else given
    if isinstance(found, str):
        raise BadInput(f"no dtype {given!r}", "name one of torch's, such as bfloat16")
    return found
