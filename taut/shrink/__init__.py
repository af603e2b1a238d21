"""A tiny twin of a configuration: every switch and every kind of layer of the original, little of its size.

A rewrite is proved on the twin and applied to the original, so the two must differ in sizes alone. Fields are shrunk by
what their names mean in the library's vocabulary, never by model. Equal sizes stay equal over the whole tree of
configurations, products such as heads x head_dim = hidden stay true, and the layers kept are those in which a kind of
layer first occurs: the kinds are read off the module tree, built on the meta device, and looked for again in the twin.
What the vocabulary gets wrong shows when the twin is built and run; then roles of fields are left as they were.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from taut.shrink.inputs import example_inputs
from taut.shrink.kinds import Kinds, first_layers, kinds_of, missing_kinds
from taut.shrink.sizes import ROLES, STRUCTURE, WIDTH, Recipe, apply, listed_layers, role_of, tree
from taut.shrink.weights import cast_weights, randomise, settle

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

__all__ = ["CannotShrink", "build_on_meta", "example_inputs", "shrink", "tiny_model"]

LARGEST = 50_000_000
EXPERTS = 8


class CannotShrink(Exception):
    """No twin was found, or the class cannot be built here; the message says why."""


def shrink(config: PreTrainedConfig, model_class: type[nn.Module] | None = None) -> PreTrainedConfig:
    """A tiny configuration of the same class, with the original's switches, ratios and kinds of layers.

    `model_class` is the class the twin must work for; by default the one named in `architectures`, else the base
    model. The result is deterministic. Raises CannotShrink when no attempt builds and runs.
    """
    twin, _ = _twin(config, model_class or class_of(config), seed=0)
    return twin


def tiny_model(
    model_class: type[nn.Module],
    config: PreTrainedConfig | None = None,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> nn.Module:
    """A tiny model of a class in eval mode, every gain, bias and matrix random and well scaled.

    `config` (default: the class's default configuration) is shrunk first. Raises CannotShrink with the reason.
    """
    if config is not None:
        return cast_weights(_twin(config, model_class, seed)[1], dtype)
    default = _default_config(model_class)
    try:
        return cast_weights(_twin(default, model_class, seed)[1], dtype)
    except CannotShrink:
        if (completed := _completed(default)) is None:
            raise
    return cast_weights(_twin(completed, model_class, seed)[1], dtype)


def class_of(config: PreTrainedConfig) -> type[nn.Module]:
    """The model class that `architectures` names, else the base model of the configuration's class."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise CannotShrink(f"{type(config).__name__} names no architecture; pass model_class")
    found: Any = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _default_config(model_class: type) -> PreTrainedConfig:
    """The class's default; but a mixture of one expert, whose router decides nothing, becomes one of several."""
    try:
        config = model_class.config_class()
    except Exception as error:
        raise CannotShrink(f"{model_class.__name__} has no default configuration: {_reason(error)}") from error
    for _, part in tree(config):
        roles = {name: role_of(name) for name in vars(part)}
        lone = [name for name, role in roles.items() if role == "experts" and vars(part)[name] == 1]
        for name in lone if "top_k" in roles.values() else ():
            setattr(part, name, EXPERTS)
    return config


def _completed(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """A default configuration with sizes given to those fields that it leaves open; None where it leaves none."""
    usual = {
        "head_dim": 64,
        "vocab_size": 1000,
        "n_routed_experts": EXPERTS,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "num_key_value_heads": 2,
    }
    config = copy.deepcopy(config)
    opened = [(part, n) for _, part in tree(config) for n in usual if vars(part).get(n, 0) is None]
    for part, name in opened:
        setattr(part, name, usual[name])
    return config if opened else None


def _twin(config: PreTrainedConfig, model_class: type, seed: int) -> tuple[PreTrainedConfig, nn.Module]:
    """The first attempt that builds, has every kind of layer and runs; its configuration and its model."""
    original = _original_on_meta(model_class, config)
    config, wanted = _with_rope_sections(config, original), kinds_of(original)
    reasons = []
    for recipe in _recipes(config):
        try:
            twin = _with_every_kind(config, recipe, model_class, wanted)
            model = _materialise(model_class, twin, seed)
            inputs = example_inputs(model)
            settle(model, inputs, seed)
            with torch.no_grad():
                model(**inputs)
            return twin, model
        except Exception as error:
            reasons.append(_reason(error))
    raise CannotShrink(f"no shrunk {type(config).__name__} runs as {model_class.__name__}; first failure: {reasons[0]}")


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def _recipes(config: PreTrainedConfig) -> Iterator[Recipe]:
    """The attempts in their fixed order: all shrunk; one role or two left alone; wider; all roles left alone."""
    present = {role_of(name) for _, part in tree(config) for name in vars(part)}
    roles = [role for role in (*ROLES, "stages") if role in present | {"stages"} and role not in STRUCTURE]
    yield Recipe()
    yield Recipe(listed=True)
    for kept in itertools.chain(itertools.combinations(roles, 1), itertools.combinations(roles, 2)):
        yield Recipe(frozenset(kept))
        yield Recipe(frozenset(kept), listed=True)
    yield Recipe(width=2 * WIDTH)
    yield Recipe(frozenset(roles))


def _with_every_kind(config: PreTrainedConfig, recipe: Recipe, model_class: type, wanted: Kinds) -> PreTrainedConfig:
    """The twin with the fewest layers that still has every kind: those where a kind first occurs, else a prefix."""
    first = first_layers(wanted)
    if recipe.listed:
        first |= {path: sorted({*first.get(path, [0, 1]), *listed_layers(part)}) for path, part in tree(config)}
    missing: set[str] = set()
    for prefix in (0, 1, 2, 4):
        layers = {path: list(range(prefix * (kept[-1] + 1))) if prefix else kept for path, kept in first.items()}
        twin = apply(config, replace(recipe, layers=layers))
        model = build_on_meta(model_class, twin)
        if (size := sum(p.numel() for p in model.parameters())) > LARGEST:
            raise CannotShrink(f"the twin still has {size:,} parameters")
        missing = missing_kinds(wanted, kinds_of(model))
        if not missing:
            return twin
    raise CannotShrink(f"kinds of layers are missing from the twin, in {sorted(missing)}")


def _with_rope_sections(config: PreTrainedConfig, model: nn.Module) -> PreTrainedConfig:
    """The configuration with those rope sections written out that the code would otherwise default."""
    config = copy.deepcopy(config)
    for module in model.modules():
        sections, own = getattr(module, "mrope_section", None), getattr(module, "config", None)
        rope = getattr(own, "rope_parameters", None)
        if isinstance(sections, (list, tuple)) and isinstance(rope, dict) and "mrope_section" not in rope:
            for _, part in tree(config):
                if type(part) is type(own):
                    cast(Any, part).rope_parameters = {**rope, "mrope_section": list(sections)}
    return config


def build_on_meta(model_class: type, config: PreTrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _original_on_meta(model_class: type, config: PreTrainedConfig) -> nn.Module:
    try:
        return build_on_meta(model_class, config)
    except Exception as error:
        raise CannotShrink(f"{model_class.__name__} cannot be built even unshrunk: {_reason(error)}") from error


def _materialise(model_class: type, config: PreTrainedConfig, seed: int) -> nn.Module:
    config = copy.deepcopy(config)
    for _, part in tree(config):
        if hasattr(part, "use_cache"):
            cast(Any, part).use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        randomise(model)
    return model
