"""The kinds of layers of a model, read off its module tree with sizes left out."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

from torch import nn

from taut.shrink.sizes import depths, is_layer_index, tree

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

# The path of the configuration that a list of layers belongs to, and the list's own path with numbers starred
# -> for each layer its index, its signature, and whether the list is as long as one of the configuration's depths.
Kinds = dict[tuple[str, str], list[tuple[int, tuple, bool]]]


def kinds_of(model: nn.Module) -> Kinds:
    """The signature of each layer of each list of modules."""
    paths = {id(part): path for path, part in tree(_config(model))}
    found: Kinds = {}
    for name, layers in model.named_modules():
        if isinstance(layers, (nn.ModuleList, nn.Sequential)) and len(layers) > 1:
            owner, config = _owner(model, name, paths)
            is_layer = len(layers) in depths(config)
            entries = found.setdefault((owner, re.sub(r"\d+", "*", name)), [])
            for i, layer in enumerate(layers):
                said = _listed(config, i, len(layers)) if is_layer else ()
                entries.append((i, (_structure(layer), *said), is_layer))
    return found


def first_layers(kinds: Kinds) -> dict[str, list[int]]:
    """Per configuration path, the layers at which a kind first occurs, two at the least."""
    kept: dict[str, set[int]] = {}
    for (owner, _), entries in kinds.items():
        first: dict[tuple, int] = {}
        for index, signature, is_layer in entries:
            first[signature] = min(first.get(signature, index), index) if is_layer else 0
        kept.setdefault(owner, set()).update(first.values())
    return {owner: sorted(indices if len(indices) > 1 else {0, 1}) for owner, indices in kept.items()}


def missing_kinds(wanted: Kinds, got: Kinds) -> set[str]:
    """Paths of the configurations whose layers lack a kind."""

    def distinct(kinds: Kinds, key: tuple[str, str]) -> set[tuple]:
        return {signature for _, signature, _ in kinds.get(key, [])}

    return {key[0] for key in wanted if not distinct(wanted, key) <= distinct(got, key)}


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


def _listed(config: PreTrainedConfig, index: int, count: int) -> tuple:
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
