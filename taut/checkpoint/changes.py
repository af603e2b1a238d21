"""From new values of parameters to edits of the tensors on disk that hold them."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.checkpoint.edits import Alike, Copy, Edit, Fill, Read, Scale
from taut.checkpoint.names import Located, name_on_disk
from taut.checkpoint.probe import Piece, length
from taut.checkpoint.shards import TensorInfo


@dataclass(frozen=True)
class Change:
    """A parameter's new value. `evaluate` gives its rows in float64, unrounded, reading parameters by name.

    `scale` (axis, vector) and `fill` are hints: the value is no more than the old one times that float64 vector along
    that axis, or that constant; such changes stream fast.
    """

    evaluate: Callable[[Read, slice | None], Tensor]
    scale: tuple[int, Tensor] | None = None
    fill: float | None = None

    @property
    def axes(self) -> tuple[int, ...] | None:
        """The parameter's axes along which the change varies; None: any."""
        return () if self.fill is not None else self.scale and self.scale[:1]


@dataclass(frozen=True)
class Part:
    """What becomes of a box of a tensor."""

    piece: Piece
    change: Change


@dataclass(frozen=True)
class Rebuilt(Alike):
    """A tensor of which some boxes take the new values of parameters; the rest stays."""

    name: str
    info: TensorInfo
    parts: tuple[Part, ...]
    located: Located

    def block(self, read: Read, rows: slice) -> Tensor:
        out = read(self.name, rows).double()
        if not self.shape:
            return self.parts[0].change.evaluate(self.located.read, None).reshape(())
        start, stop, _ = rows.indices(self.shape[0])
        for part in self.parts:
            box = part.piece.part
            first, last = max(start, box[0].start), min(stop, box[0].stop)
            if first < last:
                place = (slice(first - start, last - start), *box[1:])
                within = slice(first - box[0].start, last - box[0].start)
                if part.piece.in_order or part.change.scale is None:
                    out[place] = _box_value(part, self.located, within)
                else:
                    out[place] *= _box_factors(part, within)
        return out


def disk_edits(located: Located, changes: Mapping[str, Change]) -> tuple[dict[str, Edit], dict[str, Edit]]:
    """Edits of the checkpoint's tensors, and the tensors to be added for parameters that have just been untied.

    Raises:
        ValueError: a change cannot be written; `Located.unwritable` says so beforehand.
        BadInput: no name on disk would be read as a parameter that is to be added.
    """
    parts: dict[str, list[Part]] = {}
    for parameter, change in changes.items():
        for name in located.names_of(parameter):
            reason = located.unwritable(name, change.axes)
            if reason:
                raise ValueError(f"{parameter}: {reason}")
            if name in located.new:
                continue
            for piece in located[name]:
                part = Part(piece, change)
                if part not in parts.setdefault(piece.tensor, []):
                    parts[piece.tensor].append(part)
    edits = {tensor: _edit(tensor, located, found) for tensor, found in parts.items()}
    return edits, {name_on_disk(located, name): _added(name, located, changes) for name in located.new}


def _edit(tensor: str, located: Located, parts: list[Part]) -> Edit:
    info = located.checkpoint.tensors[tensor]
    if not info.numel:
        return Copy(tensor, info)
    values = {part.change.fill for part in parts}
    covered = sum(math.prod(map(length, part.piece.part)) for part in parts) == info.numel
    if len(values) == 1 and covered and (value := values.pop()) is not None:
        return Fill(info.shape, info.dtype, value)
    for axis in range(len(info.shape)):
        vector = _merged(info.shape, axis, parts)
        if vector is not None:
            return Scale(tensor, info, axis, vector)
    return Rebuilt(tensor, info, tuple(parts), located)


def _merged(shape: tuple[int, ...], axis: int, parts: list[Part]) -> Tensor | None:
    """One vector along an axis of the tensor that scales all boxes as they want, or None."""
    vector = torch.full(shape[axis : axis + 1], math.nan, dtype=torch.float64)
    covered = torch.zeros(shape[axis], dtype=torch.int64)
    for part in parts:
        factors = _factors(part, axis)
        if factors is None:
            return None
        span = part.piece.part[axis]
        old = vector[span]
        if not torch.all(old.isnan() | (old == factors)):
            return None
        vector[span] = factors
        covered[span] += math.prod(map(length, part.piece.part)) // length(span)
    across = math.prod(shape) // shape[axis]
    if not torch.all((covered == 0) | (covered == across)):
        return None
    return torch.where(covered == 0, 1.0, vector)


def _factors(part: Part, axis: int) -> Tensor | None:
    """The factors along an axis of the tensor that a change puts on its box, or None if it is no such scaling."""
    if part.change.scale is None:
        return None
    along, vector = part.change.scale
    mine = vector[part.piece.inside[along]]
    if part.piece.axes[along] == axis:
        return mine
    one_index = part.piece.axes[along] is None and mine.numel() == 1
    return mine.expand(length(part.piece.part[axis])) if one_index else None


def _box_value(part: Part, located: Located, rows: slice) -> Tensor:
    """The new value of some rows of a tensor's box, with the tensor's axes."""
    piece, inside = part.piece, list(part.piece.inside)
    if not inside:
        return part.change.evaluate(located.read, None).reshape([length(rows), *map(length, piece.part[1:])])
    if 0 in piece.axes:
        along = piece.axes.index(0)
        origin = inside[along].start
        inside[along] = slice(origin + rows.start, origin + rows.stop)
    value = part.change.evaluate(located.read, inside[0])[(slice(None), *inside[1:])]
    order = [piece.axes.index(axis) for axis in range(len(piece.part)) if axis in piece.axes]
    value = value.permute(*order, *[a for a in range(value.ndim) if a not in order])
    return value.reshape([length(rows), *map(length, piece.part[1:])])


def _box_factors(part: Part, rows: slice) -> Tensor:
    """What scales some rows of a tensor's box whose order along its other axes is not the parameter's."""
    assert part.change.scale is not None
    along, vector = part.change.scale
    axis, factors = part.piece.axes[along], vector[part.piece.inside[along]]
    factors = factors[rows] if axis == 0 else factors
    return factors.view([-1 if a == axis else 1 for a in range(len(part.piece.part))])


def _added(parameter: str, located: Located, changes: Mapping[str, Change]) -> Edit:
    """The tensor of a parameter that has just been untied: what it was tied to, changed or as it stands."""
    piece = located[parameter][0]
    info = located.checkpoint.tensors[piece.tensor]
    if len(located[parameter]) > 1 or info.shape != located.shapes[parameter]:
        raise ValueError(f"{parameter}: was tied to a parameter that the checkpoint holds in parts")
    if parameter not in changes:
        return Copy(piece.tensor, info)
    return _edit(piece.tensor, located, [Part(piece, changes[parameter])])
