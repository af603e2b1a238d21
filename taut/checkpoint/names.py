"""Where on disk each parameter lies.

transformers gives some checkpoint tensors other names and shapes in the module. The names here follow from its own
renaming, run on the names in the checkpoint as its loader runs it, and the parts of fused parameters from its own
conversion (`probe`). There is no table of names.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint.errors import BadInput
from taut.checkpoint.probe import Piece, Shape, Shorten, length, probe, whole
from taut.checkpoint.read import Checkpoint

CURE = "download the checkpoint again, or correct `architectures` in its config.json"
ROWS_BYTES = 64 << 20


@dataclass
class Group:
    """Checkpoint tensors that become parameters together, by the pattern they match; one name where no converter."""

    converter: Any = None
    tensors: dict[str, list[str]] = field(default_factory=dict)

    @property
    def names(self) -> list[str]:
        return [name for names in self.tensors.values() for name in names]

    def convert(self, model: Any, target: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run the conversion on tensors by their names on disk; parameters come out by their names in the model."""
        converter = copy.deepcopy(self.converter)
        for pattern, names in self.tensors.items():
            for name in names:
                converter.add_tensor(target, name, pattern, tensors[name])
        made = converter.convert(target, model=model, config=model.config)
        return {name: value[0] if isinstance(value, list) else value for name, value in made.items()}

    def probe(self, model: Any, target: str, tensors: Mapping[str, Shape], made: Mapping[str, Shape]):
        """The pieces of each parameter the conversion makes, or None where they cannot be told."""
        try:
            return probe(
                lambda values, shorten: self.convert(_Shortened(model, shorten), target, values), tensors, made
            )
        except ValueError:
            return None

    def signature(self, shapes: Iterable[Shape], made: Iterable[Shape]) -> tuple:
        """What the pieces depend on; the same for the same conversion in every layer."""
        counts = tuple((pattern, len(names)) for pattern, names in self.tensors.items())
        return str(self.converter), str(self.converter.operations), counts, tuple(shapes), tuple(made)


@dataclass
class _Shortened:
    """A model as a conversion sees it: its configuration, and its parameters' shapes, cut short."""

    model: Any
    shorten: Shorten

    @property
    def config(self) -> Any:
        return self.model.config

    def get_parameter(self, name: str) -> Tensor:
        return torch.empty(self.shorten(tuple(self.model.get_parameter(name).shape)), device="meta")


class Located(dict[str, list[Piece]]):
    """For every parameter and persistent buffer of a model, under each of its names, its pieces on disk.

    unused: checkpoint tensors that nothing in the model reads.
    ties: groups of names of one parameter.
    new: names that have just been untied, so have no tensor yet; their pieces are those of what they were tied to.
    absent: names that the checkpoint lacks and transformers fills in itself; they have no pieces.
    scattered: names whose elements lie on disk in no simple order, with the reason; they have no pieces.
    """

    def __init__(self, model: nn.Module, checkpoint: Checkpoint, shapes: Mapping[str, Shape]) -> None:
        super().__init__()
        self.model = model
        self.checkpoint = checkpoint
        self.shapes = dict(shapes)
        self.unused: list[str] = []
        self.ties: list[list[str]] = []
        self.new: list[str] = []
        self.absent: list[str] = []
        self.scattered: dict[str, str] = {}
        self._groups: dict[str, tuple[str, Group]] = {}

    def names_of(self, parameter: str) -> list[str]:
        """Every name of a parameter."""
        return next((names for names in self.ties if parameter in names), [parameter])

    def unwritable(self, parameter: str, axes: Iterable[int] | None = None) -> str | None:
        """Why new values that vary along some axes of a parameter (None: all axes) cannot be written, or None."""
        for name in self.names_of(parameter):
            if name in self.scattered:
                return self.scattered[name]
            if not self[name]:
                return f"{name} is not in the checkpoint"
            along = range(len(self.shapes[name])) if axes is None else tuple(axes)
            if any(p.axes[a] is None and length(p.inside[a]) > 1 for p in self[name] for a in along):
                return f"the checkpoint holds {name} in another order"
        return None

    def read(self, parameter: str, rows: slice | None = None) -> Tensor:
        """A parameter as the module has it, or some of its rows, assembled from its pieces."""
        pieces = self[parameter]
        if pieces and all(piece.in_order for piece in pieces):
            return assemble(self.checkpoint, pieces, self.shapes[parameter], rows)
        if parameter not in self._groups:
            raise KeyError(f"{parameter} is not in the checkpoint")
        target, group = self._groups[parameter]
        value = group.convert(self.model, target, {name: self.checkpoint.read(name) for name in group.names})[parameter]
        return value if rows is None else value[rows]


def locate(model: nn.Module, checkpoint: Checkpoint, untied: bool = False) -> Located:
    """Find every parameter of a model (on the meta device) in a checkpoint.

    `untied`: the model's ties have just been undone, so that a name without a tensor is found where it was tied to.

    Raises:
        BadInput: tensors are missing or have the wrong shape, or tied names hold different values.
    """
    state = model.state_dict(keep_vars=True)
    shapes = {name: tuple(value.shape) for name, value in state.items() if isinstance(value, Tensor)}
    found = Located(model, checkpoint, shapes)
    groups, found.unused = _group(model, list(checkpoint.tensors), shapes)
    known: dict[tuple, tuple[list[str], list[str], dict[str, list[Piece]] | None]] = {}
    for target, group in groups.items():
        if group.converter is None:
            _place(found, target, group)
        else:
            _place_converted(found, target, group, known)
    found.ties = _ties(model, state)
    for names in found.ties:
        _tie(found, names)
    if untied:
        _borrow(found)
    _check_missing(found, {name for name, _ in model.named_parameters(remove_duplicate=False)})
    return found


def conversions(model: nn.Module, legacy: bool = True) -> list[Any]:
    """transformers' renamings and conversions for a model, in order; none for a module that is not its own."""
    from transformers import PreTrainedModel
    from transformers.conversion_mapping import get_model_conversion_mapping

    return list(get_model_conversion_mapping(model, add_legacy=legacy)) if isinstance(model, PreTrainedModel) else []


def name_on_disk(found: Located, parameter: str) -> str:
    """The name under which a new tensor for a parameter is written, in the checkpoint's way of naming.

    Raises:
        BadInput: transformers would not find it there.
    """
    from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

    backwards = [t.reverse_transform() for t in conversions(found.model, legacy=False)[::-1]]
    renamings = [t for t in backwards if isinstance(t, WeightRenaming)]
    converters = [t for t in backwards if isinstance(t, WeightConverter)]
    for name in (parameter, rename_source_key(parameter, renamings, converters, reverse=True)[0]):
        if name not in found.checkpoint.tensors:
            groups, _ = _group(found.model, [*found.checkpoint.tensors, name], found.shapes)
            if groups.get(parameter) and groups[parameter].names == [name]:
                return name
    raise BadInput(f"{found.checkpoint.path}: no name on disk would be read as {parameter}", "leave it tied")


def _group(model: nn.Module, names: Iterable[str], shapes: Mapping[str, Shape]) -> tuple[dict[str, Group], list[str]]:
    """Group names on disk by the (first) parameter they make, as transformers' loader does; and the names left over."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    transforms, prefix, expected = conversions(model), getattr(model, "base_model_prefix", ""), dict(shapes)
    renamings = [t for t in transforms if isinstance(t, WeightRenaming)]
    converters = [t for t in transforms if isinstance(t, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    groups: dict[str, Group] = {}
    unused = []
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, expected)
        if target not in shapes and name in shapes:
            target, pattern = rename_source_key(name, [], [], prefix, expected)
        if target not in shapes:
            unused.append(name)
            continue
        group = groups.setdefault(target, Group(by_pattern[pattern] if pattern else None))
        group.tensors.setdefault(pattern or name, []).append(name)
    return groups, unused


def _place(found: Located, target: str, group: Group) -> None:
    if len(group.names) > 1:
        raise BadInput(f"{found.checkpoint.path}: {' and '.join(group.names)} are both {target}", CURE)
    shape = found.checkpoint.tensors[group.names[0]].shape
    _check_shape(found, target, group, shape)
    found[target] = [whole(group.names[0], shape)]


def _place_converted(found: Located, target: str, group: Group, known: dict) -> None:
    tensors = {name: found.checkpoint.tensors[name].shape for name in group.names}
    empty = {name: torch.empty(shape, device="meta") for name, shape in tensors.items()}
    try:
        made = {name: tuple(value.shape) for name, value in group.convert(found.model, target, empty).items()}
    except Exception as error:
        cause = f"{found.checkpoint.path}: {target} cannot be made of {len(tensors)} tensors ({error})"
        raise BadInput(f"{cause}: some are missing or have the wrong shape", CURE) from error
    for name, shape in made.items():
        _check_shape(found, name, group, shape)
        found._groups[name] = (target, group)
    key = group.signature(tensors.values(), made.values())
    if key not in known:
        known[key] = (list(made), list(tensors), group.probe(found.model, target, tensors, made))
    first_made, first_tensors, pieces = known[key]
    for old, name in zip(first_made, made, strict=True):
        renamed = dict(zip(first_tensors, tensors, strict=True))
        found[name] = [Piece(renamed[p.tensor], p.inside, p.part, p.axes) for p in pieces[old]] if pieces else []
        if pieces is None:
            found.scattered[name] = f"the checkpoint holds {name} in an order that cannot be told apart into pieces"


def _check_shape(found: Located, name: str, group: Group, shape: Shape) -> None:
    if name not in found.shapes:
        raise BadInput(f"{found.checkpoint.path}: {group.names[0]} makes {name}, which the model does not have", CURE)
    if shape != found.shapes[name]:
        cause = f"{group.names[0]} makes {name} {list(shape)}, and the model has {list(found.shapes[name])}"
        raise BadInput(f"{found.checkpoint.path}: wrong shape: {cause}", CURE)


def _ties(model: nn.Module, state: Mapping[str, Any]) -> list[list[str]]:
    """Names of one parameter: the same object, or tied when transformers loads the model."""
    groups: dict[Any, list[str]] = {}
    for name, value in state.items():
        groups.setdefault(id(value), []).append(name)
    owner = {name: names for names in groups.values() for name in names}
    for target, source in getattr(model, "all_tied_weights_keys", {}).items():
        if target in owner and source in owner and owner[target] is not owner[source]:
            owner[source] += owner[target]
            owner.update(dict.fromkeys(owner[target], owner[source]))
    return [names for names in {id(names): names for names in owner.values()}.values() if len(names) > 1]


def _tie(found: Located, names: list[str]) -> None:
    present = [name for name in names if name in found]
    for other in present[1:]:
        if not _equal(found, present[0], other):
            cause = f"{found.checkpoint.path}: config.json ties {present[0]} and {other}, but their tensors differ"
            raise BadInput(cause, "set tie_word_embeddings to false in config.json, as transformers would not tie them")
    for name in names:
        if present and name not in found:
            found[name] = found[present[0]]


def _equal(found: Located, a: str, b: str) -> bool:
    if found[a] == found[b]:
        return True
    shape = found.shapes[a]
    if not shape or found.shapes[b] != shape:
        return found.shapes[b] == shape and torch.equal(found.read(a), found.read(b))
    step = max(1, ROWS_BYTES // max(1, torch.Size(shape[1:]).numel() * 8))
    spans = (slice(start, start + step) for start in range(0, shape[0], step))
    return all(torch.equal(found.read(a, rows), found.read(b, rows)) for rows in spans)


def _borrow(found: Located) -> None:
    """Names that the class can tie, and that have no tensor of their own, are found where they were tied to."""
    model: Any = found.model
    before = model.config.tie_word_embeddings
    try:
        model.config.tie_word_embeddings = True
        pairs = dict(model.get_expanded_tied_weights_keys(all_submodels=True))
    finally:
        model.config.tie_word_embeddings = before
    for target, source in pairs.items():
        for name, other in ((target, source), (source, target)):
            if name in found.shapes and name not in found and other in found:
                found[name] = found[other]
                found.new.append(name)


def _check_missing(found: Located, parameters: set[str]) -> None:
    expected = getattr(found.model, "_keys_to_ignore_on_load_missing", None) or ()
    missing = [name for name in found.shapes if name not in found]
    found.absent = [n for n in missing if n not in parameters or any(re.search(pattern, n) for pattern in expected)]
    lost = sorted(set(missing) - set(found.absent))
    if lost:
        named = ", ".join(lost[:5]) + (f" and {len(lost) - 5} more" if len(lost) > 5 else "")
        raise BadInput(f"{found.checkpoint.path}: the weights lack {named} of {type(found.model).__name__}", CURE)
    found.update({name: [] for name in found.absent})


def assemble(checkpoint: Checkpoint, pieces: Sequence[Piece], shape: Shape, rows: slice | None = None) -> Tensor:
    """A parameter of some shape, or some of its rows, from its pieces on disk, all of which are in order."""
    as_it_stands = len(pieces) == 1 and pieces[0] == whole(pieces[0].tensor, shape)
    if as_it_stands and checkpoint.tensors[pieces[0].tensor].shape == shape:
        return checkpoint.read(pieces[0].tensor, rows)
    if not shape:
        return checkpoint.read(pieces[0].tensor).reshape(())
    start, stop, _ = (rows or slice(None)).indices(shape[0])
    stop = max(start, stop)
    out = torch.empty((stop - start, *shape[1:]), dtype=checkpoint.tensors[pieces[0].tensor].dtype)
    for piece in pieces:
        first, last = max(start, piece.inside[0].start), min(stop, piece.inside[0].stop)
        if first < last:
            target = (slice(first - start, last - start), *piece.inside[1:])
            out[target] = _box(checkpoint, piece, first - piece.inside[0].start, last - piece.inside[0].start)
    return out


def _box(checkpoint: Checkpoint, piece: Piece, first: int, last: int) -> Tensor:
    """Rows [first, last) of a piece, counted within it, with the parameter's axes."""
    part = list(piece.part)
    if piece.axes[0] is not None:
        origin = part[piece.axes[0]].start
        part[piece.axes[0]] = slice(origin + first, origin + last)
    if not part:
        return checkpoint.read(piece.tensor)
    value = checkpoint.read(piece.tensor, part[0])[(slice(None), *part[1:])]
    along = [axis for axis in piece.axes if axis is not None]
    value = value.permute(*along, *[axis for axis in range(value.ndim) if axis not in along])
    return value.reshape([last - first, *map(length, piece.inside[1:])])
