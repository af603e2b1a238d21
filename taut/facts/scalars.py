"""How a scalar per token follows a movement of the values that it multiplies.

The scalar has one element where the value has many. The movement of the value is known on an array of indices; of some
ways to move the scalar, the one is taken that leaves every scalar where the movement leaves its value. No way holds a
size that is not the model's own, so that it is right at other sizes too.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import GATHERS, RESHAPES
from taut.graph import shape
from taut.lift._match import CASTS

aten = torch.ops.aten

Call = tuple[Any, tuple, dict]
"""An op with the arguments behind its first one."""


def agree(one: Tensor, two: Tensor) -> bool:
    return bool((one == two).all())


def run(calls: tuple[Call, ...], ids: Any) -> Any | None:
    """The indices after some calls; None where they do not fit."""
    for target, args, kwargs in calls:
        try:
            ids = target(ids, *fx.map_arg(args, lambda n: n.meta["val"]), **kwargs)
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None
    return list(ids) if isinstance(ids, tuple) else ids


def covers(result: Any, wanted: Any) -> bool:
    """Whether indices of scalars broadcast to the indices of values, axis by axis."""
    if isinstance(wanted, list | tuple):
        parts = result if isinstance(result, list) else [result] * len(wanted)
        return len(parts) == len(wanted) and all(covers(p, w) for p, w in zip(parts, wanted, strict=True))
    if not isinstance(result, Tensor) or result.ndim != wanted.ndim:
        return False
    return all(r in (1, w) for r, w in zip(result.shape, wanted.shape, strict=True)) and agree(result, wanted)


def movements(node: fx.Node) -> Iterator[tuple[Call, ...]]:
    """Ways in which the scalar may follow a movement: not at all, by the same op, or by one that knows it is narrow."""
    source: Any = node.args[0]
    yield ()
    if node.target in RESHAPES:
        yield from _narrow_views(node)
    elif node.target not in GATHERS | CASTS:
        yield ((node.target, tuple(node.args[1:]), dict(node.kwargs)),)
    if node.target in (aten.select.int, aten.unbind.int):
        yield ((aten.squeeze.dim, ((*node.args, 0)[1],), {}),)
    elif node.target is aten.squeeze.default:
        yield ((aten.squeeze.dims, ([a for a, size in enumerate(shape(source)) if size == 1],), {}),)
    elif node.target is aten.unflatten.int:
        axis, sizes = node.args[1:3]
        yield ((aten.unflatten.int, (axis, [1] * len(sizes)), {}),)  # type: ignore[arg-type]
    elif node.target is aten.expand.default:
        yield ((aten.unsqueeze.default, (0,), {}),) * (len(shape(node)) - len(shape(source)))


def _narrow_views(node: fx.Node) -> Iterator[tuple[Call, ...]]:
    """The same view with 1 for some of its sizes, from all of them down to none."""
    sizes: Any = node.args[1]
    axes = range(len(sizes))
    for ones in sorted(range(1 << len(sizes)), key=lambda bits: -bits.bit_count()):
        yield ((aten.reshape.default, ([1 if ones >> a & 1 else sizes[a] for a in axes],), {}),)
