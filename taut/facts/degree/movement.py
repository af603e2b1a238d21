"""Rules for ops that put elements elsewhere."""

from __future__ import annotations

import operator
from dataclasses import replace
from typing import Any

import torch
from torch import fx

from taut.facts.degree.records import Scaled, Step
from taut.facts.degree.sums import RANKS
from taut.facts.degree.walk import NOT_PROPORTIONAL, Walk, args
from taut.facts.moves import is_move
from taut.facts.moves import move as moved
from taut.facts.scalars import Call, covers, movements, run
from taut.graph import shape

aten = torch.ops.aten


def move(walk: Walk, node: fx.Node) -> Scaled | str:
    source: Any = args(node)[0]
    at = walk.at(source)
    if at is None or walk.sources(node) != [source] or not is_move(node):
        return NOT_PROPORTIONAL
    wanted = moved(node, at.ids.expand(shape(source)))
    if wanted is None:
        return "picks tokens by an index that depends on the input"
    return _stepped(at, (source,), movements(node), at.ids, wanted)


def item(walk: Walk, node: fx.Node) -> Scaled | str | None:
    source, index = args(node)
    at = walk.at(source)
    if at is None or (source.target in RANKS and index == 1):
        return None
    if isinstance(at.ids, list):
        return replace(at, ids=at.ids[index], step=Step((source,), ((operator.getitem, (index,), {}),)))
    return replace(at, step=Step((source,)))


def join(walk: Walk, node: fx.Node) -> Scaled | str:
    parts: Any = args(node)[0]
    ats = [walk.at(part) for part in parts]
    if any(at is None for at in ats) or len({at.degree for at in ats if at is not None}) != 1:
        return "joins values that scale differently"
    found = [at for at in ats if at is not None]
    wholes = [at.ids.expand(shape(part)) for at, part in zip(found, parts, strict=True)]
    target: Any = node.target
    wanted = target(wholes, *args(node)[1:], **node.kwargs)
    first = replace(found[0], behind=all(at.behind for at in found))
    axis: Any = (*args(node), 0)[1]
    alike = [()] if target is aten.cat.default else [((aten.unsqueeze.default, (axis,), {}),)]
    result = _stepped(first, (parts[0],), alike, first.ids, wanted)
    if isinstance(result, str):
        joined: list[tuple[Call, ...]] = [((target, tuple(args(node)[1:]), dict(node.kwargs)),)]
        result = _stepped(first, tuple(parts), joined, [at.ids for at in found], wanted)
    return result


def pairs(walk: Walk, node: fx.Node) -> Scaled | str:
    """Two real features are one complex number, or back."""
    x: Any = args(node)[0]
    at = walk.at(x)
    if at is None or (node.target is aten.view_as_complex.default and at.ids.shape[-1] != 1):
        return "mixes features with different scalars"
    if node.target is aten.view_as_complex.default:
        return replace(at, ids=at.ids.squeeze(-1), step=Step((x,), ((aten.squeeze.dim, (-1,), {}),)))
    return replace(at, ids=at.ids.unsqueeze(-1), step=Step((x,), ((aten.unsqueeze.default, (-1,), {}),)))


def _stepped(at: Scaled, sources: tuple, candidates: Any, ids: Any, wanted: Any) -> Scaled | str:
    """The first of some ways to move the scalar that leaves it where the movement leaves the value."""
    for calls in candidates:
        result = run(calls, ids)
        if result is not None and covers(result, wanted):
            return replace(at, ids=result, step=Step(sources, calls))
    return "moves tokens in a way that their scalars cannot follow"
