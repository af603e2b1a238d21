"""A tiny twin of a configuration: every switch and every kind of layer of the original, little of its size.

A rewrite is proved on the twin and applied to the original, so the two must differ in sizes alone. Fields are shrunk by
what their names mean in the library's vocabulary, never by model. Equal sizes stay equal over the whole tree of
configurations, products such as heads x head_dim = hidden stay true, and the depth is the shortest prefix of layers in
which every kind of layer occurs: the kinds are read off the module tree, built on the meta device.
"""

from __future__ import annotations

import copy
import inspect
import itertools
import math
import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from transformers import PretrainedConfig

WIDTH = 64
UNIT = 8
VOCAB = 160
LENGTH = 13
LARGEST = 50_000_000

# What a field's name says about its integers; the first match counts, and what matches nothing is kept.
ROLES = {
    "frames": r"^max_source_positions$",
    "keep": r"(ignore|loss|cost|position|relative|bucket|type_vocab|per_layer_config)",
    "depth": r"^(depths?|layers|n_layers?|block_sizes|\w*blocks_per_stage|\w*num_blocks|num_block_repeats|n_attn_blocks)$"
    r"|^(?!.*(dense|shared|window|feat_extract|conv|postnet|prenet|nextn|mtp|global|first|last|moe|cross_att|rope|attn_l"
    r"|proj_l|extract|add_l|target|encode_|nonlin|scaling|source|only|look|subsample|per_stack))\w*(_layers|_depth)$",
    "leading": r"^(first_k_dense_replace|num_dense_layers|moe_layer_start_index|num_first_full_attention_layers)$",
    "trailing": r"^(num_kv_shared_layers|num_last_full_attention_layers)$",
    "ids": r"(token_(id|index)s?|(bos|eos|pad|unk|mask|sep|cls|start|end|newline|patch|blank)_(id|index))$",
    "vocab": r"(vocab_size|vocab_size_base|_vocab|codebook_size|num_embeds|n_codes_total|num_clusters|vocab_offset)$|"
    r"^num_embeddings$|vocab_size_per_layer",
    "head_dim": r"(^|_)(head_dim|d_head|dim_head|headdim|d_kv|kv_channels|rotary_dim|attention_head_size)$",
    "heads": r"(^|_)(heads?|n_heads|nheads|num_query_groups|n_?groups|heads_per_(stage|layer))$",
    "routed": r"^(n_group|num_expert_groups?|topk_group)$",
    "experts": r"^(?!.*shared)\w*(_experts|expert_num)$",
    "top_k": r"experts_per_tok(en)?$|^moe_(k|topk|top_k)$",
    "window": r"sliding_window(_size)?s?$|attention_chunk_size|^local_attention$|index_topk|attention_window(_size)?$"
    r"|^(mamba_)?chunk_size$",
    "image": r"^(pretrain_)?(image|img)_size$",
    "mel": r"mel_bins$",
    "queries": r"^(num_queries|num_query_tokens|\w*num_latents|n_latents|resampler_n_latents|num_denoising)$",
    "groups": r"groups$",
    "width": r"^(?!.*(vocab|image|img|patch_s|kernel|window|batch|crop|block|chunk|tile|merge|pool_|cache|group|roi|stride"
    r"|grid|max_|feature_sizes|mask_size|rope|shape|final_size|per_sample))"
    r"\w*(size|dims?|_dimension|channels?|rank|units|width|embd|inner|features|inplanes|feature_dims|d_ff|d_model"
    r"|dff|dim_ff|sizes|ssm|channel_list|per_stage|d_state|state_size|out_channel)$|^(dim|d_model|d_ff|ffn_dim)$",
}


class CannotShrink(Exception):
    """No twin was found, or the class cannot be built here; the message says why."""


def role_of(name: str) -> str:
    """What a configuration field's name says about its integers: a key of ROLES, or "keep"."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name.lstrip("_"))), "keep")


@dataclass
class Recipe:
    """Decisions of one attempt: roles left as they are, the layers kept (by configuration path), the hidden width."""

    kept: frozenset[str] = frozenset()
    layers: dict[str, list[int]] = field(default_factory=dict)
    width: int = WIDTH


def shrink(config: PretrainedConfig, model_class: type[nn.Module] | None = None) -> PretrainedConfig:
    """A tiny configuration of the same class, with the original's switches, ratios and kinds of layers.

    `model_class` is the class the twin must work for; by default the one named in `architectures`, else the base
    model. The result is deterministic. Raises CannotShrink when no attempt builds and runs.
    """
    model_class = model_class or class_of(config)
    original = _build_original(model_class, config)
    config, wanted = _explicit(config, original), _kinds(original)
    reasons = []
    for recipe in _recipes(config):
        try:
            twin = _with_every_kind(config, recipe, model_class, wanted)
            _check(model_class, twin)
            return twin
        except Exception as error:
            reasons.append(f"{type(error).__name__}: {error}".splitlines()[0][:200])
    raise CannotShrink(f"no shrunk {type(config).__name__} runs as {model_class.__name__}; first failure: {reasons[0]}")


def class_of(config: PretrainedConfig) -> type[nn.Module]:
    """The model class that `architectures` names, else the base model of the configuration's class."""
    import transformers

    for name in config.architectures or ():
        if hasattr(transformers, name):
            return getattr(transformers, name)
    from transformers.models.auto.modeling_auto import MODEL_MAPPING

    if type(config) not in MODEL_MAPPING:
        raise CannotShrink(f"{type(config).__name__} names no architecture; pass model_class")
    found = MODEL_MAPPING[type(config)]
    return found[0] if isinstance(found, (tuple, list)) else found


def _recipes(config: PretrainedConfig) -> Iterator[Recipe]:
    """The attempts in their fixed order: everything shrunk, then wider, then ever more roles left alone."""
    present = {role_of(name) for _, part in tree(config) for name in vars(part)} - {"keep", "depth", "leading", "trailing"}
    roles = [role for role in ROLES if role in present]
    yield Recipe()
    for kept in itertools.chain(itertools.combinations(roles, 1), itertools.combinations(roles, 2)):
        yield Recipe(frozenset(kept))
    yield Recipe(width=2 * WIDTH)
    yield Recipe(frozenset(roles))


def tree(config: PretrainedConfig, path: str = "") -> Iterator[tuple[str, PretrainedConfig]]:
    """A configuration and all configurations nested in it, each with its dotted path."""
    from transformers import PretrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PretrainedConfig):
            yield from tree(value, f"{path}.{name}" if path else name)


def _with_every_kind(config: PretrainedConfig, recipe: Recipe, model_class: type, wanted: Kinds) -> PretrainedConfig:
    """The twin with the fewest layers that still has every kind: those where a kind first occurs, else a prefix."""
    first = _first_layers(wanted)
    missing: set[str] = set()
    for factor in (0, 1, 2, 4):
        layers = {path: range(factor * (max(kept) + 1)) if factor else kept for path, kept in first.items()}
        twin = _apply(config, Recipe(recipe.kept, {path: list(kept) for path, kept in layers.items()}, recipe.width))
        missing = _missing(wanted, _kinds(_build_on_meta(model_class, twin)))
        if not missing:
            return twin
    raise CannotShrink(f"kinds of layers are missing from the twin, in {sorted(missing)}")


def _explicit(config: PretrainedConfig, model: nn.Module) -> PretrainedConfig:
    """The configuration with those rope sections written out that the code would otherwise default."""
    config = copy.deepcopy(config)
    for module in model.modules():
        sections = getattr(module, "mrope_section", None)
        rope = getattr(getattr(module, "config", None), "rope_parameters", None)
        if isinstance(sections, (list, tuple)) and isinstance(rope, dict) and "mrope_section" not in rope:
            for _, part in tree(config):
                if type(part) is type(module.config):
                    part.rope_parameters = {**rope, "mrope_section": list(sections)}
    return config


def _apply(config: PretrainedConfig, recipe: Recipe) -> PretrainedConfig:
    twin = copy.deepcopy(config)
    sizes = _Sizes(config, recipe)
    for (path, part), (_, original) in zip(list(tree(twin)), list(tree(config)), strict=True):
        for name, value in list(vars(original).items()):
            new = sizes.new(path, original, name, value)
            if new is not value and new != value:
                part.__dict__[name] = new
    return twin


class _Sizes:
    """The new value of every field. One map per role over the whole tree keeps equal values equal."""

    def __init__(self, config: PretrainedConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.scale = max(1.0, _hidden(config) / recipe.width)
        values: dict[str, set[int]] = {}
        for _, part in tree(config):
            for name, value in vars(part).items():
                values.setdefault(role_of(name), set()).update(_ints(value))
        self.vocab = {v: VOCAB + UNIT * i for i, v in enumerate(sorted(v for v in values.get("vocab", ()) if v > 256))}
        smallest = min([VOCAB, *(v for v in values.get("vocab", ()) if v > 16)])
        large = sorted(v for v in values.get("ids", ()) if v >= smallest // 2)
        self.ids = {v: smallest - len(large) + i for i, v in enumerate(large)}

    def new(self, path: str, part: PretrainedConfig, name: str, value: Any) -> Any:
        role = role_of(name)
        if name == "id2label" and value:
            return dict(list(value.items())[:5])
        if name == "label2id" and value:
            return dict(list(value.items())[:5])
        if name == "rope_parameters":
            return self.rope(part, value)
        if name in ("stage_names", "_out_features", "_out_indices", "out_indices"):
            return self.stages(path, part, name, value)
        if _is_layer_index(name, value):
            return self.layer_index(path, part, value)
        if isinstance(value, (list, tuple)) and _is_per_layer(part, name, value):
            value = type(value)(value[i] for i in self.layers(path, len(value)))
        if role in ("leading", "trailing") and isinstance(value, int) and (count := _own_depth(part)):
            return sum((i < value) if role == "leading" else (i >= count - value) for i in self.layers(path, count))
        if role == "keep" or role in self.recipe.kept or isinstance(value, dict):
            return value
        return _map_ints(value, lambda v: self.number(role, path, part, name, v))

    def number(self, role: str, path: str, part: PretrainedConfig, name: str, v: int) -> int:
        if v <= 1:
            return v
        match role:
            case "depth":
                return self.depth(path, v)
            case "ids":
                return self.ids.get(v, v)
            case "vocab":
                return self.vocab.get(v, v)
            case "heads":
                return self.heads(part, v)
            case "head_dim":
                return self.head_dim(part, name, v)
            case "experts" | "routed" | "top_k":
                return self.router(role, part, name, v)
            case "window":
                return min(v, 8)
            case "image":
                return self.image(part, v)
            case "mel" | "frames" | "queries":
                return min(v, {"mel": 16, "frames": 24, "queries": 8}[role])
            case "groups":
                return self.width(v) if v > 4 and v in _widths(part) else min(v, 4)
        return self.width(v)

    def width(self, v: int) -> int:
        """A multiple of UNIT in proportion, but never so narrow that a norm or a head over it says little."""
        if v <= 16 or self.scale == 1:
            return v
        least = next(small for large, small in ((256, 32), (64, 16), (0, UNIT)) if v >= large)
        return min(v, max(least, UNIT * round(v / self.scale / UNIT)))

    def layers(self, path: str, count: int) -> list[int]:
        """Which of `count` layers are kept."""
        return [i for i in self.recipe.layers.get(path, [0, 1]) if i < count]

    def depth(self, path: str, v: int) -> int:
        return len(self.layers(path, v))

    def heads(self, part: PretrainedConfig, v: int) -> int:
        """Head counts of one configuration in order: 2, 4, 8, ...; the largest alone gets 4."""
        if "width" in self.recipe.kept:
            return v
        counts = sorted({h for name, value in vars(part).items() if role_of(name) == "heads" for h in _ints(value) if h > 1})
        small = [2 ** (i + 1) for i in range(len(counts))] if len(counts) > 1 else [4]
        return min(v, dict(zip(counts, small, strict=True))[v])

    def head_dim(self, part: PretrainedConfig, name: str, v: int) -> int:
        """Keep heads x head_dim / hidden where the name tells its heads; otherwise the ratio to such a head_dim."""
        pairs = _head_pairs(part)
        hidden = _own_hidden(part)
        if not hidden or not pairs or "width" in self.recipe.kept:
            return v if "width" in self.recipe.kept else max(4, 4 * round(v / 16))
        if name in pairs:
            heads = pairs[name]
            exact = v * heads / hidden * self.width(hidden) / self.heads(part, heads)
            return max(4, 4 * round(min(exact, 32) / 4)) if exact != int(exact) or exact > 48 else int(exact)
        anchor = max(pairs, key=lambda n: getattr(part, n))
        ratio = self.head_dim(part, anchor, getattr(part, anchor)) / getattr(part, anchor)
        return max(4, 4 * round(v * ratio / 4))

    def router(self, role: str, part: PretrainedConfig, name: str, v: int) -> int:
        grouped = max((getattr(part, n, None) or 1) for n in ("n_group", "num_expert_group", "num_expert_groups")) > 1
        if role == "experts":
            return min(v, 8 if grouped else 5)
        if role == "routed":
            return min(v, 2 if name == "topk_group" else 4)
        return min(v, 2)

    def image(self, part: PretrainedConfig, v: int) -> int:
        patch = max([1, *_ints(getattr(part, "patch_size", 16))])
        merge = max([1, *_ints(getattr(part, "spatial_merge_size", 1))])
        return min(v, 64 if hasattr(part, "depths") else patch * merge * max(2, 4 // merge))

    def rope(self, part: PretrainedConfig, value: Any) -> Any:
        """Rope dictionaries, also nested per layer type: sections and factor lists follow the rotary width."""
        if not isinstance(value, dict) or "width" in self.recipe.kept or "head_dim" in self.recipe.kept:
            return value
        return {k: self.rope_entry(part, k, v) for k, v in value.items()}

    def rope_entry(self, part: PretrainedConfig, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self.rope(part, value)
        if not isinstance(value, (list, tuple)) or not value:
            return value
        old = sum(value) if key == "mrope_section" else len(value)
        new = max(1, round(old * self.rotary_ratio(part)))
        if key == "mrope_section":
            return type(value)(_apportion(value, new))
        return value[:new] if key.endswith("_factor") else value

    def rotary_ratio(self, part: PretrainedConfig) -> float:
        for name in ("qk_rope_head_dim", "head_dim"):
            if getattr(part, name, None):
                old = getattr(part, name)
                return self.head_dim(part, name, old) / old
        hidden, heads = _own_hidden(part), part.num_attention_heads
        return self.width(hidden) / self.heads(part, heads) / (hidden / heads)

    def stages(self, path: str, part: PretrainedConfig, name: str, value: Any) -> Any:
        """Backbone stages: one per layer where the stages are layers, else unchanged."""
        layers = _own_depth(part)
        if not value or not layers or len(part.stage_names) != layers + 1:
            return value
        last = self.depth(path, layers)
        if name == "stage_names":
            return value[: last + 1]
        taken = sorted({max(0, last - i) for i in range(len(value))})
        return [f"stage{i}" if i else "stem" for i in taken] if name == "_out_features" else taken

    def layer_index(self, path: str, part: PretrainedConfig, value: Any) -> Any:
        """Indices of layers, renumbered; those counted from the end are only kept in range."""
        kept = self.layers(path, _own_depth(part) or 10**9)
        if isinstance(value, int):
            return max(value, -len(kept))
        inside = [kept.index(v) if v >= 0 else v for v in value if v in kept or -len(kept) <= v < 0]
        return type(value)(inside)


def _ints(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [v for item in value for v in _ints(item)]
    return [value] if isinstance(value, int) and not isinstance(value, bool) else []


def _map_ints(value: Any, change: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map_ints(item, change) for item in value)
    return change(value) if isinstance(value, int) and not isinstance(value, bool) else value


def _apportion(parts: list[int], total: int) -> list[int]:
    """Integers in proportion to `parts`, none below one where it was not, with sum `total`."""
    scaled = [max(1, p * total // sum(parts)) if p else 0 for p in parts]
    for i in itertools.cycle(range(len(parts))):
        if sum(scaled) >= total:
            return scaled
        scaled[-1 - i] += 1
    return scaled


def _widths(part: PretrainedConfig) -> set[int]:
    return {v for name, value in vars(part).items() if role_of(name) == "width" for v in _ints(value)}


def _own_hidden(part: PretrainedConfig) -> int | None:
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim"):
        value = getattr(part, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def _hidden(config: PretrainedConfig) -> float:
    """The width that decides the scale: the text model's, else the first found, else four times a pyramid's first."""
    text = _own_hidden(config.get_text_config())
    found = [h for _, part in tree(config) if (h := _own_hidden(part))]
    pyramid = [4 * value[0] for _, part in tree(config) for name, value in vars(part).items()
               if name in ("hidden_sizes", "embed_dims", "embed_dim") and isinstance(value, (list, tuple)) and value]
    return next(iter([h for h in (text, *found, *pyramid) if h]), WIDTH)


def _own_depth(part: PretrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "num_layers", "depth", "n_layer"):
        value = getattr(part, name, None)
        if isinstance(value, int):
            return value
    return None


def _depths(part: PretrainedConfig) -> set[int]:
    return {v for name, v in vars(part).items() if role_of(name) == "depth" and isinstance(v, int)}


def _is_per_layer(part: PretrainedConfig, name: str, value: Any) -> bool:
    return len(value) > 2 and len(value) in _depths(part) and role_of(name) not in ("ids",)


def _is_layer_index(name: str, value: Any) -> bool:
    listed = re.search(r"(layers|indexes|indices|idxs|layer_ids|blocks)$", name)
    single = re.search(r"^(vision_feature_layer|feature_layer|vision_feature_select_layer|spatial_vision_layer)$", name)
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return bool(single or (listed and list(value) == sorted(set(value))))
    return bool(single and isinstance(value, int))


def _head_pairs(part: PretrainedConfig) -> dict[str, int]:
    """Head-width fields that have a count of heads beside them: name of the width -> the count."""
    counts = {
        "head_dim": ("num_attention_heads", "num_heads"),
        "v_head_dim": ("num_attention_heads",),
        "attention_head_dim": ("num_attention_heads",),
        "kv_channels": ("num_attention_heads",),
        "d_kv": ("num_heads",),
        "mamba_d_head": ("mamba_n_heads",),
        "mamba_head_dim": ("mamba_num_heads",),
        "linear_value_head_dim": ("linear_num_value_heads",),
        "linear_key_head_dim": ("linear_num_key_heads",),
        "swa_head_dim": ("swa_num_attention_heads",),
    }
    pairs = {}
    for name, candidates in counts.items():
        found = [h for c in candidates if isinstance(h := getattr(part, c, None), int)]
        if found and isinstance(getattr(part, name, None), int):
            pairs[name] = found[0]
    return pairs


def _build_on_meta(model_class: type, config: PretrainedConfig) -> nn.Module:
    with torch.device("meta"):
        return model_class(copy.deepcopy(config))


def _build_original(model_class: type, config: PretrainedConfig) -> nn.Module:
    try:
        return _build_on_meta(model_class, config)
    except Exception as error:
        reason = f"{type(error).__name__}: {error}".strip().splitlines()[0]
        raise CannotShrink(f"{model_class.__name__} cannot be built even unshrunk: {reason}") from error


Kinds = dict[tuple[str, str], list[tuple[int, tuple, bool]]]


def _kinds(model: nn.Module) -> Kinds:
    """Per list of layers, the signature of each layer. Keys: the path of the list's configuration, and the list."""
    paths = {id(part): path for path, part in tree(model.config)}
    found: Kinds = {}
    for name, layers in model.named_modules():
        if isinstance(layers, (nn.ModuleList, nn.Sequential)) and len(layers) > 1:
            owner, config = _owner(model, name, paths)
            key = (owner, re.sub(r"\d+", "*", name))
            is_layer = len(layers) in _depths(config)
            signatures = (_signature(layer, i, len(layers), config) for i, layer in enumerate(layers))
            found.setdefault(key, []).extend((i, s, is_layer) for i, s in enumerate(signatures))
    return found


def _owner(model: nn.Module, name: str, paths: dict[int, str]) -> tuple[str, PretrainedConfig]:
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        config = getattr(model.get_submodule(".".join(parts[:end])), "config", None)
        if id(config) in paths:
            return paths[id(config)], config
    return "", model.config


def _signature(layer: nn.Module, index: int, count: int, config: PretrainedConfig) -> tuple:
    """What a layer is, sizes left out: its classes, which parameters it has, its switches and its listed types."""
    parts = set()
    for name, module in layer.named_modules():
        parameters = tuple(sorted(f"{n}:{p is not None}" for n, p in module._parameters.items()))
        parts.add((re.sub(r"\d+", "*", name), type(module).__name__, parameters, _switches(module)))
    listed = [(n, v[index]) for n, v in vars(config).items() if isinstance(v, (list, tuple)) and len(v) == count
              and re.search(r"(types?|layers|pattern|modes?)$", n) and isinstance(v[index], (str, bool))]
    indexed = [(n, index in v) for n, v in vars(config).items() if _is_layer_index(n, v) and isinstance(v, (list, tuple))]
    return (frozenset(parts), *listed, *indexed)


def _switches(module: nn.Module) -> tuple:
    counters = r"idx|index|layer_?(id|num|number|depth)?$|block|number|training"
    return tuple(sorted(
        (name, str(value) if isinstance(value, (bool, str, type(None))) else str(bool(value)))
        for name, value in vars(module).items()
        if isinstance(value, (bool, str, int, type(None))) and not name.startswith("_") and not re.search(counters, name)
    ))


def _first_layers(kinds: Kinds) -> dict[str, list[int]]:
    """Per configuration path, the layers at which a kind first occurs, two at the least."""
    kept: dict[str, set[int]] = {}
    for (owner, _), signatures in kinds.items():
        first: dict[tuple, int] = {}
        for index, signature, is_layer in signatures:
            first[signature] = min(first.get(signature, index), index) if is_layer else 0
        kept.setdefault(owner, set()).update(first.values())
    return {owner: sorted(indices if len(indices) > 1 else {0, 1}) for owner, indices in kept.items()}


def _missing(wanted: Kinds, got: Kinds) -> set[str]:
    def distinct(kinds: Kinds, key: tuple[str, str]) -> set[tuple]:
        return {signature for _, signature, _ in kinds.get(key, [])}

    return {key[0] for key in wanted if not distinct(wanted, key) <= distinct(got, key)}


def _check(model_class: type, twin: PretrainedConfig) -> None:
    size = sum(p.numel() for p in _build_on_meta(model_class, twin).parameters())
    if size > LARGEST:
        raise CannotShrink(f"the twin still has {size:,} parameters")
    model = _materialise(model_class, twin, 0, torch.float32)
    with torch.no_grad():
        model(**example_inputs(model))


def tiny_model(
    model_class: type[nn.Module], config: PretrainedConfig | None = None, seed: int = 0, dtype: torch.dtype = torch.float32
) -> nn.Module:
    """A tiny model of a class in eval mode, every gain, bias and matrix random and well scaled.

    `config` (default: the class's default configuration) is shrunk first. Raises CannotShrink with the reason.
    """
    if config is None:
        config = _default_config(model_class)
    return _materialise(model_class, shrink(config, model_class), seed, dtype)


def _default_config(model_class: type) -> PretrainedConfig:
    try:
        return model_class.config_class()
    except Exception as error:
        raise CannotShrink(f"{model_class.__name__} has no default configuration: {error}".splitlines()[0]) from error


def _materialise(model_class: type, config: PretrainedConfig, seed: int, dtype: torch.dtype) -> nn.Module:
    config = copy.deepcopy(config)
    for _, part in tree(config):
        if hasattr(part, "use_cache"):
            part.use_cache = False
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = model_class(config).eval()
        randomise(model)
    for tensor in itertools.chain(model.parameters(), _persistent_buffers(model).values()):
        if tensor.is_floating_point():
            tensor.data = tensor.data.to(dtype)
    return model


def _persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    saved = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in saved}


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Perturb every vector around its initial value and redraw every matrix at a scale that keeps activations in range."""
    for module in model.modules():
        for name, p in module._parameters.items():
            if p is not None and p.is_floating_point():
                p.copy_(_random_vector(p) if p.ndim <= 1 else _random_matrix(module, p))
        for name, b in module._buffers.items():
            if name in ("running_mean", "running_var") and b is not None:
                b.copy_(torch.rand_like(b) + (0.5 if name == "running_var" else -0.5))


def _random_vector(p: Tensor) -> Tensor:
    p = torch.nan_to_num(p)
    noise = torch.randn_like(p).clamp(-2, 2)
    return p + (0.3 if bool((p == 1).all()) else 0.2) * noise


def _random_matrix(module: nn.Module, p: Tensor) -> Tensor:
    mean, std = p.mean().item(), p.std().item()
    if math.isfinite(std) and abs(mean) > max(std / 2, 1e-6):
        return p + 0.1 * torch.randn_like(p)
    if isinstance(module, nn.Embedding):
        return 0.5 * torch.randn_like(p)
    fan_in = math.prod(p.shape[1:]) if hasattr(module, "kernel_size") else max(p.shape[-2:])
    return 0.8 / math.sqrt(fan_in) * torch.randn_like(p)


def example_inputs(model: nn.Module, batch: int = 2, length: int = LENGTH, seed: int = 0) -> dict[str, Tensor]:
    """Keyword inputs made up from the signature of `forward` and the configuration, on the model's device.

    Text alone where the class takes it. Row 1 of `attention_mask` ends in padding; no row is all padding.
    """
    inputs = _Inputs(model, batch, length, seed)
    options = inputs.options()
    for option in options[:-1]:
        if inputs.runs(option):
            return inputs.make(option)
    return inputs.make(options[-1] if len(options) == 1 or inputs.runs(options[-1]) else options[0])


class _Inputs:
    def __init__(self, model: nn.Module, batch: int, length: int, seed: int) -> None:
        self.model, self.batch, self.length = model, batch, length
        self.config: Any = model.config
        self.generator = torch.Generator().manual_seed(seed)
        self.seed = seed
        self.accepted = inspect.signature(model.forward).parameters
        self.device = next(model.parameters()).device
        self.dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def options(self) -> list[tuple[str, ...]]:
        """Sets of main inputs, the smallest first."""
        known = ("input_ids", "pixel_values", "input_features", "input_values")
        main = getattr(self.model, "main_input_name", "input_ids")
        present = [name for name in dict.fromkeys((*known, main)) if name in self.accepted]
        singles: list[tuple[str, ...]] = [(name,) for name in sorted(present, key=lambda n: (n != "input_ids", n != main))]
        pairs = [tuple(pair) for pair in itertools.combinations(present, 2)]
        return singles + pairs or [(main,)]

    def runs(self, names: tuple[str, ...]) -> bool:
        try:
            with torch.no_grad():
                self.model(**self.make(names))
        except Exception:
            return False
        return True

    def make(self, names: tuple[str, ...]) -> dict[str, Tensor]:
        self.generator.manual_seed(self.seed)
        made = {name: getattr(self, name, self.input_ids)() for name in names}
        for name, parameter in self.accepted.items():
            needed = parameter.default is parameter.empty and parameter.kind is parameter.POSITIONAL_OR_KEYWORD
            if name not in made and hasattr(self, f"extra_{name}"):
                extra = getattr(self, f"extra_{name}")(made)
                made |= {} if extra is None else {name: extra}
            elif name not in made and needed and name in vars(type(self)):
                made[name] = getattr(self, name)()
        return {name: self.place(value) for name, value in made.items()}

    def place(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def number(self, *names: str, default: int) -> int:
        for name in names:
            for _, part in tree(self.config):
                value = getattr(part, name, None)
                if value is not None and _ints(value):
                    return _ints(value)[0]
        return default

    def ids(self, vocab: int, length: int) -> Tensor:
        """Ids over the whole vocabulary but for the special ones."""
        special = {v for _, part in tree(self.config) for n, value in vars(part).items()
                   if role_of(n) == "ids" for v in _ints(value)}
        plain = torch.tensor([i for i in range(min(vocab, 100_000)) if i not in special] or [0])
        return plain[torch.randint(len(plain), (self.batch, length), generator=self.generator)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def mask(self, length: int) -> Tensor:
        mask = torch.ones(self.batch, length, dtype=torch.long)
        mask[-1, -max(1, length // 4) :] = 0
        return mask

    def input_ids(self) -> Tensor:
        text = self.config.get_text_config()
        return self.ids(getattr(text, "vocab_size", None) or self.number("vocab_size", default=VOCAB), self.length)

    def pixel_values(self) -> Tensor:
        side = self.number("image_size", "img_size", default=64)
        sizes = next((_ints(v) for _, p in tree(self.config) if (v := getattr(p, "image_size", None))), [side])
        height, width = (sizes * 2)[:2]
        return self.normal(self.number("num_channels", "in_channels", "in_chans", default=3), height, width)

    def input_features(self) -> Tensor:
        bins = self.number("num_mel_bins", "feature_size", "input_feat_per_channel", "input_dim", default=80)
        return self.normal(bins, 2 * self.number("max_source_positions", default=24))

    def input_values(self) -> Tensor:
        strides = next((v for _, p in tree(self.config) if (v := getattr(p, "conv_stride", None))), (5, 2, 2, 2, 2, 2, 2))
        return self.normal(math.prod(strides) * self.length + 80)

    def extra_attention_mask(self, made: dict[str, Tensor]) -> Tensor | None:
        main = made.get("input_ids", made.get("input_values"))
        return None if main is None or main.ndim != 2 else self.mask(main.shape[1])

    def extra_token_type_ids(self, made: dict[str, Tensor]) -> Tensor | None:
        kinds = self.number("type_vocab_size", default=0)
        if kinds < 2 or "input_ids" not in made:
            return None
        return (torch.arange(self.length) >= self.length // 2).long().expand(self.batch, -1)

    def extra_decoder_input_ids(self, made: dict[str, Tensor]) -> Tensor:
        return self.ids(self.number("decoder_vocab_size", "tgt_vocab_size", "vocab_size", default=VOCAB), self.length - 2)

    def extra_bbox(self, made: dict[str, Tensor]) -> Tensor:
        corner = torch.randint(0, 400, (self.batch, self.length, 2), generator=self.generator)
        return torch.cat([corner, corner + 50], dim=-1)
