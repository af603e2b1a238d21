"""Columns that are picked from a product are picked as rows of its weight, once, when the program is made."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from taut.runtime.pieces import Gather
from taut.runtime.steps import Linear, Program, Step, Torch, View, Weight


def without_gathers(program: Program) -> Program:
    """Every linear step of which only picked columns are read computes those columns, in the order in which they are.

    Heads that lie interleaved in one weight (query, key and value of a head side by side) come apart so.
    """
    readers: dict[str, list[Step]] = {}
    for step in program.steps:
        for view in views(step):
            readers.setdefault(view.buffer, []).append(step)
    places: dict[str, View] = {}
    widths = dict(program.widths)
    kept: list[Step] = []
    for step in program.steps:
        gathers: Any = readers.get(step.out, []) if isinstance(step, Linear) and step.residual is None else []
        if isinstance(step, Linear) and gathers and all(_is_gather(g) for g in gathers):
            index = torch.cat([g.inputs[0].start + g.run.index for g in gathers])
            ends = torch.tensor([len(g.run.index) for g in gathers]).cumsum(0).tolist()
            for g, end in zip(gathers, ends, strict=True):
                places[g.outs[0]] = View(step.out, end - len(g.run.index), end)
                del widths[g.outs[0]]
            widths[step.out] = len(index)
            kept.append(moved(_rows(step, index), places))
        elif not (isinstance(step, Torch) and step.outs[0] in places):
            kept.append(moved(step, places))
    return replace(program, steps=tuple(kept), widths=widths)


def _is_gather(step: Step) -> bool:
    return isinstance(step, Torch) and isinstance(step.run, Gather)


def _rows(step: Linear, index: Tensor) -> Linear:
    scale = None if step.weight.scale is None else step.weight.scale[index]
    bias = None if step.bias is None else step.bias[index]
    return replace(step, weight=Weight(step.weight.data[index], scale), bias=bias)


def views(step: Step) -> list[View]:
    """What a step reads."""
    parts = [getattr(step, part.name) for part in fields(step)]
    parts += parts.pop(1) if isinstance(step, Torch) else []
    return [part for part in parts if isinstance(part, View)]


def moved(step: Step, places: dict[str, View]) -> Step:
    """A step that reads the same values where they are now."""

    def now(part: Any) -> Any:
        if isinstance(part, tuple):
            return tuple(now(p) for p in part)
        if not isinstance(part, View) or part.buffer not in places:
            return part
        place = places[part.buffer]
        return View(place.buffer, place.start + part.start, place.start + part.stop)

    return replace(step, **{part.name: now(getattr(step, part.name)) for part in fields(step)})
