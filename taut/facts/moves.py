"""Movement: ops that put elements elsewhere and change none. Their rule is to run them on an array of indices."""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import shape
from taut.lift._match import CASTS, is_cast

aten = torch.ops.aten

RESHAPES = {aten.view.default, aten._unsafe_view.default, aten.reshape.default}
GATHERS = {aten.index.Tensor, aten.index_select.default, aten.gather.default}
SWAPS = (aten.t.default, aten.transpose.int, aten.mT.default)
"""Of a matrix they all make the transpose."""

MOVES = (
    CASTS
    | RESHAPES
    | GATHERS
    | {
        aten.unsqueeze.default,
        aten.squeeze.default,
        aten.squeeze.dim,
        aten.squeeze.dims,
        aten.expand.default,
        aten.flatten.using_ints,
        aten.unflatten.int,
        aten.transpose.int,
        aten.permute.default,
        aten.t.default,
        aten.numpy_T.default,
        aten.mT.default,
        aten.movedim.int,
        aten.swapaxes.default,
        aten.slice.Tensor,
        aten.select.int,
        aten.narrow.default,
        aten.split.Tensor,
        aten.split_with_sizes.default,
        aten.split.sizes,
        aten.chunk.default,
        aten.unbind.int,
        aten.unfold.default,
        aten.repeat.default,
        aten.repeat_interleave.self_int,
        aten.flip.default,
        aten.roll.default,
        operator.getitem,
    }
)


def is_move(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target in MOVES and (node.target not in CASTS or is_cast(node))


def constant_along(array: Tensor, axis: int) -> bool:
    array = without_repeats(array)
    return not array.numel() or bool((array == array.narrow(axis, 0, 1)).all())


def without_repeats(array: Tensor) -> Tensor:
    """One of each of what an expanded array only seems to hold several times."""
    for axis, stride in enumerate(array.stride()):
        if stride == 0 and array.shape[axis] > 1:
            array = array.narrow(axis, 0, 1)
    return array


def move(node: fx.Node, array: Any) -> Any | None:
    """Run a movement on an index array; None where the outcome depends on an index that the trace does not know."""
    if node.target in CASTS:
        return array
    rest = node.args[1:]
    if node.target is operator.getitem:
        return array[rest[0]]
    if node.target in GATHERS:
        axes = _indexed_axes(node)
        if axes is None or not all(constant_along(array, axis) for axis in axes):
            return None
        rest = fx.map_arg(rest, lambda n: torch.zeros(shape(n), dtype=torch.long))
    rest = fx.map_arg(rest, lambda n: n.meta["val"])
    if node.target in RESHAPES:
        return array.reshape(shape(node))
    kwargs = {k: v for k, v in node.kwargs.items() if not isinstance(v, fx.Node)}
    target: Any = node.target
    return target(array, *rest, **kwargs)


def _indexed_axes(node: fx.Node) -> list[int] | None:
    """The axes whose elements a gather picks; None for boolean masks."""
    if node.target is not aten.index.Tensor:
        axis: Any = node.args[1]
        return [axis]
    indices: Any = node.args[1]
    if any(i is not None and i.meta["val"].dtype in (torch.bool, torch.uint8) for i in indices):
        return None
    return [axis for axis, index in enumerate(indices) if index is not None]
