"""Which part of a parameter each checkpoint tensor holds, found by pushing element numbers through the conversion.

transformers builds some parameters from several checkpoint tensors (the experts of a layer, stacked and joined), or
several from one. Its own conversion is run on tensors whose elements are numbered; where the numbers come out says
which element went where. Large tensors are probed with most of their axes cut short, which is trusted only where two
different cuts agree and where the result, scaled back up, tiles the parameter without a gap or an overlap.
"""

from __future__ import annotations

import itertools
import math
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

Shape = tuple[int, ...]
Shorten = Callable[[Shape], Shape]
Convert = Callable[[dict[str, Tensor], Shorten], dict[str, Tensor]]
"""A conversion: checkpoint tensors in, parameters out; a parameter's shape that it asks for must be shortened too."""
QUICK, POSSIBLE = 1 << 20, 1 << 24
SHORTEST = 8


@dataclass(frozen=True)
class Piece:
    """A box of a parameter, and the box of a checkpoint tensor that holds it.

    `inside` are the parameter's slices, `part` the tensor's. `axes[a]` is the tensor's axis that runs along axis a of
    the parameter in the same order. None: the piece has one index there (one expert of a stack), or, where the slice
    is longer than one, its order differs on disk and nothing that varies along this axis can be written.
    """

    tensor: str
    inside: tuple[slice, ...]
    part: tuple[slice, ...]
    axes: tuple[int | None, ...]

    @property
    def in_order(self) -> bool:
        """Whether the piece is the tensor's box with its axes permuted at the most."""
        return all(axis is not None or length(s) == 1 for axis, s in zip(self.axes, self.inside, strict=True))


def length(s: slice) -> int:
    return s.stop - s.start


def whole(name: str, shape: Shape) -> Piece:
    """A tensor that is a parameter as it stands."""
    full = tuple(slice(0, size) for size in shape)
    return Piece(name, full, full, tuple(range(len(shape))))


def probe(convert: Convert, tensors: Mapping[str, Shape], parameters: Mapping[str, Shape]) -> dict[str, list[Piece]]:
    """The pieces of each parameter that a conversion makes.

    Args:
        convert: the conversion, by names on disk.
        tensors: shapes of the checkpoint tensors that go in, in their order.
        parameters: the shapes that the model expects to come out.

    Raises:
        ValueError: the conversion moves elements in a way that cannot be described piece by piece.
    """
    lengths = _common_lengths(list(tensors.values()))
    for cut in _cuts(lengths, list(tensors.values())):
        found = _probe(convert, tensors, parameters, cut)
        if found is None:
            continue
        other = tuple(size and _short(full, second=True) for size, full in zip(cut, lengths, strict=True))
        if not any(cut) or _probe(convert, tensors, parameters, other) == found:
            return found
    raise ValueError(f"cannot tell which parts of {', '.join(parameters)} the checkpoint's tensors hold")


def _common_lengths(shapes: Sequence[Shape]) -> Shape:
    """For each axis the length that all tensors have there, or 0."""
    if len({len(shape) for shape in shapes}) > 1:
        return ()
    return tuple(sizes[0] if len(set(sizes)) == 1 else 0 for sizes in zip(*shapes, strict=True))


def _cuts(lengths: Shape, shapes: Sequence[Shape]) -> list[Shape]:
    """For each axis a short length to stand in for the real one, or 0 to leave it; the least cut first.

    Those that are probed quickly are given; where there are none, the smallest that can be probed at all.
    """
    choices = itertools.product(*[dict.fromkeys((0, _short(length) if length else 0)) for length in lengths])
    sizes = {cut: sum(math.prod(_apply(cut, shape)) for shape in shapes) for cut in choices}
    quick = [cut for cut, size in sizes.items() if size <= QUICK]
    smallest = [cut for cut, size in sizes.items() if size == min(sizes.values()) and size <= POSSIBLE]
    return sorted(quick, key=lambda cut: -cut.count(0)) or smallest[:1]


def _short(full: int, second: bool = False) -> int:
    """One of two short lengths that divide a length and are even where it is; 0 where there are no two."""
    step = 2 if full % 2 == 0 else 1
    divisors = [d for d in range(SHORTEST, full // 2 + 1, step) if full % d == 0][:2]
    return divisors[second] if len(divisors) == 2 else 0


def _apply(cut: Shape, shape: Shape) -> Shape:
    return tuple(c or s for c, s in zip(cut, shape, strict=True)) if cut else shape


def _probe(
    convert: Convert, tensors: Mapping[str, Shape], parameters: Mapping[str, Shape], cut: Shape
) -> dict[str, list[Piece]] | None:
    """The pieces in full size, or None where the conversion does not work on tensors cut this way."""
    lengths = _common_lengths(list(tensors.values()))
    shapes = {name: _apply(cut, shape) for name, shape in tensors.items()}
    starts = [0, *itertools.accumulate(math.prod(shape) for shape in shapes.values())]
    numbered = {
        name: torch.arange(start, start + math.prod(shape), dtype=torch.int32).view(shape)
        for (name, shape), start in zip(shapes.items(), starts, strict=False)
    }
    try:
        converted = convert(numbered, lambda shape: _shorten(shape, lengths, cut))
    except Exception:
        return None
    if set(converted) != set(parameters):
        return None
    found = {}
    for parameter, numbers in converted.items():
        boxes = _boxes(numbers, shapes, starts)
        pieces = [_piece(name, shapes[name], tensors[name], where, values) for name, where, values in boxes]
        whole_pieces = [piece for piece in pieces if piece is not None]
        if len(whole_pieces) < len(pieces) or not _tile(whole_pieces, parameters[parameter]):
            return None
        found[parameter] = whole_pieces
    return found


def _shorten(shape: Shape, lengths: Shape, cut: Shape) -> Shape:
    """A parameter's shape, cut at the axes where it has the tensors' length."""
    pairs = itertools.zip_longest(shape, lengths[: len(shape)], cut[: len(shape)], fillvalue=0)
    return tuple(short if short and size == full else size for size, full, short in pairs)


def _boxes(
    numbers: Tensor, shapes: Mapping[str, Shape], starts: Sequence[int]
) -> Iterator[tuple[str, tuple[slice, ...], np.ndarray]]:
    """For each tensor that reached the parameter: its name, its bounding box there, and its own element numbers."""
    flat = numbers.contiguous().numpy().ravel()
    order = np.argsort(flat, kind="stable")
    bounds = np.searchsorted(flat[order], starts)
    for i, name in enumerate(shapes):
        mine = order[bounds[i] : bounds[i + 1]]
        if not mine.size or np.any(flat[mine[1:]] == flat[mine[:-1]]):
            continue
        where = np.unravel_index(mine, numbers.shape)
        box = tuple(slice(int(c.min()), int(c.max()) + 1) for c in where)
        yield name, box, numbers.numpy()[box] - starts[i]


def _piece(name: str, shape: Shape, full: Shape, box: tuple[slice, ...], numbers: np.ndarray) -> Piece | None:
    """The piece in full size, where a box of the parameter is a box of the tensor; None where it is not."""
    if numbers.min() < 0 or numbers.max() >= math.prod(shape):
        return None
    coordinates = np.unravel_index(numbers, shape)
    part = tuple(slice(int(c.min()), int(c.max()) + 1) for c in coordinates)
    if math.prod(map(length, part)) != numbers.size:
        return None
    factors = [size // short for size, short in zip(full, shape, strict=True)]
    axes: list[int | None] = [None] * numbers.ndim
    scales = [1] * numbers.ndim
    for axis, along in enumerate(coordinates):
        varies = [a for a in range(along.ndim) if np.any(np.diff(along, axis=a))]
        if len(varies) == 1:
            line = np.moveaxis(along, varies[0], 0).reshape(along.shape[varies[0]], -1)[:, 0]
            if np.array_equal(line, np.arange(part[axis].start, part[axis].stop)):
                axes[varies[0]] = axis
        for a in varies:
            scales[a] *= factors[axis]
    grown = tuple(slice(s.start * f, s.stop * f) for s, f in zip(part, factors, strict=True))
    inside = tuple(slice(s.start * f, s.stop * f) for s, f in zip(box, scales, strict=True))
    return Piece(name, inside, grown, tuple(axes))


def _tile(pieces: Sequence[Piece], shape: Shape) -> bool:
    """Whether the pieces cover a parameter of this shape, every element once."""
    if any(len(piece.inside) != len(shape) for piece in pieces):
        return False
    edges = [
        sorted({0, size}.union(*[(p.inside[axis].start, p.inside[axis].stop) for p in pieces]))
        for axis, size in enumerate(shape)
    ]
    if any(edge[0] < 0 or edge[-1] > size for edge, size in zip(edges, shape, strict=True)):
        return False
    covered = np.zeros([len(edge) - 1 for edge in edges], np.int32)
    for piece in pieces:
        cells = zip(edges, piece.inside, strict=True)
        covered[tuple(slice(bisect_left(edge, s.start), bisect_left(edge, s.stop)) for edge, s in cells)] += 1
    return bool((covered == 1).all())
