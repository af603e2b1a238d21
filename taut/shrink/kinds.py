"""The kinds of layers of a model, read off its module tree with sizes left out."""

from __future__ import annotations

import re
from collections import Counter
from typing import TYPE_CHECKING, Any, NamedTuple

from torch import nn

from taut.shrink.sizes import depths, is_layer_index, tree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class Layer(NamedTuple):
    """One element of a list of modules: `counted` if the list is as long as one of its configuration's depths, `shared`
    if another element owns one of its parameters too."""

    at: int
    structure: frozenset
    listed: tuple[tuple[str, Any], ...]
    counted: bool
    shared: bool


# Keys: the path of the configuration that a list of modules belongs to, and the list's own path with numbers starred.
Kinds = dict[tuple[str, str], list[Layer]]


def kinds_of(model: nn.Module) -> Kinds:
    """Every list of modules, each element with what tells its kind."""
    paths = {id(part): path for path, part in tree(_config(model))}
    found: Kinds = {}
    for name, layers in model.named_modules():
        if isinstance(layers, (nn.ModuleList, nn.Sequential)):
            owner, config = _owner(model, name, paths)
            counted = len(layers) in depths(config)
            owners = Counter(id(p) for layer in layers for p in layer.parameters())
            found.setdefault((owner, re.sub(r"\d+", "*", name)), []).extend(
                Layer(
                    at=i,
                    structure=_structure(layer),
                    listed=_listed(config, i, len(layers)),
                    counted=counted,
                    shared=any(owners[id(p)] > 1 for p in layer.parameters()),
                )
                for i, layer in enumerate(layers)
            )
    return found


def first_layers(kinds: Kinds) -> dict[str, list[int]]:
    """Per configuration path, the layers at which a kind first occurs, two of a kind that shares parameters, and two
    at the least."""
    kept: dict[str, set[int]] = {}
    for (owner, _), layers in kinds.items():
        places: dict[tuple, list[int]] = {}
        for layer in layers:
            if layer.counted:
                places.setdefault((layer.structure, layer.listed, layer.shared), []).append(layer.at)
        first = {at for kind, found in places.items() for at in sorted(found)[: 2 if kind[-1] else 1]}
        kept.setdefault(owner, set()).update(first)
    return {owner: sorted(indices if len(indices) > 1 else {0, 1}) for owner, indices in kept.items()}


def missing_kinds(wanted: Kinds, got: Kinds) -> set[str]:
    """Paths of the configurations whose layers lack a kind. What only `got` lists is a coincidence of lengths."""
    missing = set()
    for key, layers in wanted.items():
        counted = any(layer.counted for layer in layers)
        names = {name for layer in layers for name, _ in layer.listed} if counted else set()
        if not _distinct(layers, names, counted) <= _distinct(got.get(key, []), names, counted):
            missing.add(key[0])
    return missing


def _distinct(layers: list[Layer], names: set[str], counted: bool) -> set[tuple]:
    return {
        (layer.structure, tuple(pair for pair in layer.listed if pair[0] in names), layer.shared and counted)
        for layer in layers
    }


def _owner(model: nn.Module, name: str, paths: dict[int, str]) -> tuple[str, PreTrainedConfig]:
    """The configuration of the nearest module above that has one, with its path."""
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        config = _config(model.get_submodule(".".join(parts[:end])))
        if id(config) in paths:
            return paths[id(config)], config
    return "", _config(model)


def _config(module: nn.Module) -> Any:
    return getattr(module, "config", None)


def _structure(layer: nn.Module) -> frozenset:
    """What a layer is made of: its classes, which parameters they have, their switches."""
    parts = set()
    for name, module in layer.named_modules():
        parameters = tuple(sorted(f"{n}:{p is not None}" for n, p in module._parameters.items()))
        parts.add((re.sub(r"\d+", "*", name), type(module).__name__, parameters, _switches(module)))
    return frozenset(parts)


def _listed(config: PreTrainedConfig, index: int, count: int) -> tuple[tuple[str, Any], ...]:
    """What the configuration's lists say of one of its layers: its types, and whether its index is named."""
    lists = {n: v for n, v in vars(config).items() if isinstance(v, (list, tuple))}
    types = [
        (n, v[index])
        for n, v in lists.items()
        if len(v) == count and re.search(r"(types?|layers|pattern|modes?)$", n) and isinstance(v[index], (str, bool))
    ]
    return (*types, *((n, index in v) for n, v in lists.items() if is_layer_index(n, v)))


def _switches(module: nn.Module) -> tuple:
    """A module's booleans, strings and absent members; of an integer, which may be a size, only whether it is zero."""
    counters = r"idx|index|layer_?(id|num|number|depth)?$|block|number|training"
    return tuple(
        sorted(
            (name, str(bool(value)) if type(value) is int else str(value))
            for name, value in vars(module).items()
            if isinstance(value, (bool, str, int, type(None)))
            and not name.startswith("_")
            and not re.search(counters, name)
        )
    )
