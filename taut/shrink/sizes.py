"""What each configuration field means, and what it becomes in the twin."""

from __future__ import annotations

import copy
import functools
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from transformers import PreTrainedConfig

WIDTH = 64
UNIT = 8
VOCAB = 160
# Roles that decide which layers there are; an attempt never leaves these alone.
STRUCTURE = ("keep", "depth", "leading", "trailing")

# What a field's name says about its integers; the first match counts, and what matches nothing is kept.
ROLES = {
    "frames": r"^max_source_positions$",
    "keep": r"(ignore|loss|cost|position|relative|bucket|type_vocab|per_layer_config)",
    "depth": r"^(depths?|layers|n_layers?|block_sizes|\w*blocks_per_stage|\w*num_blocks|num_block_repeats)$"
    r"|^\w*_per_block$"
    r"|^n_attn_blocks$|^(?!.*(dense|shared|window|feat_extract|conv|postnet|prenet|nextn|mtp|global|first|last|moe|cross_att|rope|attn_l"
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
    "picks": r"^index_topk$",
    "window": r"sliding_window(_size)?s?$|attention_chunk_size|^local_attention$|attention_window(_size)?$"
    r"|^(mamba_)?chunk_size$|^compress_rates$",
    "image": r"^(pretrain_)?(image|img)_size$",
    "grid": r"^(image_embedding_size|backbone_feature_sizes|memory_attention_rope_(feat|k)_sizes)$",
    "filters": r"^num_filters$",
    "mel": r"mel_bins$",
    "queries": r"^(num_queries|num_query_tokens|\w*num_latents|n_latents|resampler_n_latents|num_denoising)$",
    "groups": r"groups$",
    "width": r"^(?!.*(vocab|image|img|patch_s|kernel|window|batch|crop|block|chunk|tile|merge|pool_|cache|group|roi"
    r"|stride|grid|max_|feature_sizes|mask_size|rope|shape|final_size|per_sample))"
    r"\w*(size|dims?|_dimension|channels?|rank|units|width|embd|inner|features|inplanes|feature_dims|d_ff|d_model"
    r"|dff|dim_ff|sizes|ssm|channel_list|per_stage|d_state|state_size|out_channel)$|^(dim|d_model|d_ff|ffn_dim|d_latents)$",
}


@functools.cache
def role_of(name: str) -> str:
    """What a configuration field's name says about its integers: a key of ROLES, or "keep"."""
    return next((role for role, pattern in ROLES.items() if re.search(pattern, name.lstrip("_"))), "keep")


@dataclass
class Recipe:
    """Decisions of one attempt: the roles left as they are, whether every layer that a list names must be kept, the
    layers kept (by configuration path), and the hidden width."""

    kept: frozenset[str] = frozenset()
    listed: bool = False
    layers: dict[str, list[int]] = field(default_factory=dict)
    width: int = WIDTH


def tree(config: PreTrainedConfig, path: str = "") -> Iterator[tuple[str, PreTrainedConfig]]:
    """A configuration and all configurations nested in it, each with its dotted path."""
    from transformers import PreTrainedConfig

    yield path, config
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            yield from tree(value, f"{path}.{name}" if path else name)


def apply(config: PreTrainedConfig, recipe: Recipe) -> PreTrainedConfig:
    """A deep copy of a configuration with every field shrunk as the recipe says."""
    twin, whole, of_layers = copy.deepcopy(config), copy.deepcopy(config), {}
    for path, part in tree(whole):
        if getattr(part, "is_heterogeneous", False):
            of_layers[path] = {int(i): own for i, own in part.to_dict()["per_layer_config"].items()}
            part.per_layer_config = None  # what a layer may have of its own could not be read otherwise
    sizes = Sizes(whole, recipe)
    for (path, part), (_, original) in zip(list(tree(twin)), list(tree(whole)), strict=True):
        for name, value in list(vars(original).items()):
            new = sizes.new(path, original, name, value)
            if new is not value and new != value:
                part.__dict__[name] = new
        if path in of_layers:
            cast(Any, part).per_layer_config = sizes.of_layers(path, original, of_layers[path])
    return twin


class Sizes:
    """The new value of every field. One map per role over the whole tree keeps equal values equal."""

    def __init__(self, config: PreTrainedConfig, recipe: Recipe) -> None:
        self.recipe = recipe
        self.scale = max(1.0, _hidden(config) / recipe.width)
        values: dict[str, set[int]] = {}
        for _, part in tree(config):
            for name, value in vars(part).items():
                values.setdefault(role_of(name), set()).update(ints(value))
        self.image_ratio = min((self.image(p, v) / v for _, p in tree(config) for v in _image_sizes(p)), default=1.0)
        self.vocab = {v: VOCAB + UNIT * i for i, v in enumerate(sorted(v for v in values.get("vocab", ()) if v > 256))}
        smallest = min([VOCAB, *(v for v in values.get("vocab", ()) if v >= 64)])
        large = sorted(v for v in values.get("ids", ()) if v >= smallest // 2)
        self.ids = {v: smallest - len(large) + i for i, v in enumerate(large)}

    def new(self, path: str, part: PreTrainedConfig, name: str, value: Any) -> Any:
        role = role_of(name)
        if name in ("id2label", "label2id") and value:
            return dict(list(value.items())[:5])
        if name == "rope_parameters":
            return self.rope(part, value)
        if hasattr(part, "stage_names") and name in ("stage_names", "_out_features", "_out_indices", "out_indices"):
            return self.stages(path, part, name, value)
        if is_layer_index(name, value):
            return self.layer_index(path, part, value)
        if isinstance(value, (list, tuple)) and _is_per_layer(part, name, value):
            value = type(value)(value[i] for i in self.layers(path, len(value)))
        if role in ("leading", "trailing") and isinstance(value, int) and (count := _own_depth(part)):
            return sum((i < value) if role == "leading" else (i >= count - value) for i in self.layers(path, count))
        if role == "depth" and not isinstance(value, int):
            role = "stages"
        if role == "keep" or role in self.recipe.kept:
            return value
        if isinstance(value, dict):
            return {k: self.number(role, path, part, name, v) for k, v in value.items()} if role == "window" else value
        return _map_ints(value, lambda v: self.number(role, path, part, name, v))

    def of_layers(self, path: str, part: PreTrainedConfig, given: dict[int, dict[str, Any]]) -> dict[int, dict]:
        """What the layers that are kept have of their own."""
        kept = enumerate(self.layers(path, _own_depth(part) or 10**9))
        return {i: {n: self.new(path, part, n, v) for n, v in given[old].items()} for i, old in kept if old in given}

    def number(self, role: str, path: str, part: PreTrainedConfig, name: str, v: int) -> int:
        if v <= 1:
            return v
        match role:
            case "depth":
                return self.depth(path, v) if v in depths(part) else v
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
            case "picks":
                return min(v, 2)
            case "image":
                return self.image(part, v)
            case "grid":
                return max(1, round(v * self.image_ratio))
            case "mel" | "frames" | "queries" | "filters" | "stages":
                return min(v, {"mel": 16, "frames": 24, "queries": 8, "filters": 4, "stages": 2}[role])
            case "groups":
                return self.width(v) if v > 4 and v in _widths(part) else min(v, 4)
        return self.width(v)

    def width(self, v: int) -> int:
        """A multiple of UNIT in proportion, but never so narrow that a norm or a head over it says little."""
        if v <= 16 or self.scale == 1:
            return v
        return min(v, max(32 if v >= 256 else 16, UNIT * round(v / self.scale / UNIT)))

    def layers(self, path: str, count: int) -> list[int]:
        """Which of `count` layers are kept."""
        return [i for i in self.recipe.layers.get(path, [0, 1]) if i < count]

    def depth(self, path: str, v: int) -> int:
        return len(self.layers(path, v))

    def heads(self, part: PreTrainedConfig, v: int) -> int:
        """Head counts of one configuration in order: 2, 4, 8, ...; the largest alone gets 4."""
        if "width" in self.recipe.kept:
            return v
        counts = sorted(
            {h for name, value in vars(part).items() if role_of(name) == "heads" for h in ints(value) if h > 1}
        )
        small = [2 ** (i + 1) for i in range(len(counts))] if len(counts) > 1 else [4]
        return min(v, dict(zip(counts, small, strict=True))[v])

    def head_dim(self, part: PreTrainedConfig, name: str, v: int) -> int:
        """Keep heads x head_dim / hidden where the name tells its heads; otherwise the ratio to such a head_dim."""
        pairs = _head_pairs(part)
        hidden = _own_hidden(part)
        if not hidden or not pairs or "width" in self.recipe.kept:
            return v if "width" in self.recipe.kept else max(4, 4 * round(v / 16))
        if name in pairs:
            small = self.width(hidden) / self.heads(part, pairs[name])
            ratio = v * pairs[name] / hidden
            new = max(4, 4 * round(min(ratio * small, 64 if ratio == int(ratio) else 32) / 4))
            return int(small) if ratio == 1 and small == int(small) else new + 4 * (new == small)
        anchor = max(pairs, key=lambda n: getattr(part, n))
        ratio = self.head_dim(part, anchor, getattr(part, anchor)) / getattr(part, anchor)
        return max(4, 4 * round(v * ratio / 4))

    def router(self, role: str, part: PreTrainedConfig, name: str, v: int) -> int:
        grouped = max((getattr(part, n, None) or 1) for n in ("n_group", "num_expert_group", "num_expert_groups")) > 1
        if role == "experts":
            return min(v, 8 if grouped else 5)
        if role == "routed":
            return min(v, 2 if name == "topk_group" else 4)
        return min(v, 2)

    def image(self, part: PreTrainedConfig, v: int) -> int:
        patch = max([1, *ints(getattr(part, "patch_size", 16))])
        merge = max([1, *ints(getattr(part, "spatial_merge_size", 1))])
        return min(v, 64 if hasattr(part, "depths") else patch * merge * max(2, round(64 / (patch * merge))))

    def rope(self, part: PreTrainedConfig, value: Any) -> Any:
        """Rope dictionaries, also nested per layer type: sections and factor lists follow the rotary width."""
        if not isinstance(value, dict) or "width" in self.recipe.kept or "head_dim" in self.recipe.kept:
            return value
        return {k: self.rope_entry(part, k, v) for k, v in value.items()}

    def rope_entry(self, part: PreTrainedConfig, key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return self.rope(part, value)
        if not isinstance(value, (list, tuple)) or not value:
            return value
        old = sum(value) if key == "mrope_section" else len(value)
        new = max(1, round(old * self.rotary_ratio(part)))
        if key == "mrope_section":
            return type(value)(_apportion(value, new))
        return value[:new] if key.endswith("_factor") else value

    def rotary_ratio(self, part: PreTrainedConfig) -> float:
        for name in ("qk_rope_head_dim", "head_dim"):
            if getattr(part, name, None):
                old = getattr(part, name)
                return self.head_dim(part, name, old) / old
        hidden, heads = _own_hidden(part) or 1, part.num_attention_heads
        return self.width(hidden) / self.heads(part, heads) / (hidden / heads)

    def stages(self, path: str, part: PreTrainedConfig, name: str, value: Any) -> Any:
        """Backbone stages: one per layer where the stages are layers, else unchanged."""
        layers = _own_depth(part)
        if not value or not layers or len(part.stage_names) != layers + 1:
            return value
        last = self.depth(path, layers)
        if name == "stage_names":
            return value[: last + 1]
        taken = sorted({max(0, last - i) for i in range(len(value))})
        return [f"stage{i}" if i else "stem" for i in taken] if name == "_out_features" else taken

    def layer_index(self, path: str, part: PreTrainedConfig, value: Any) -> Any:
        """Indices of layers, renumbered; those counted from the end are only kept in range."""
        kept = self.layers(path, _own_depth(part) or 10**9)
        if isinstance(value, int):
            return max(value, -len(kept))
        inside = [kept.index(v) if v >= 0 else v for v in value if v in kept or -len(kept) <= v < 0]
        return type(value)(inside)


def ints(value: Any) -> list[int]:
    if isinstance(value, (list, tuple)):
        return [v for item in value for v in ints(item)]
    return [value] if type(value) is int else []


def _map_ints(value: Any, change: Callable[[int], int]) -> Any:
    if isinstance(value, (list, tuple)):
        return type(value)(_map_ints(item, change) for item in value)
    return change(value) if type(value) is int else value


def _apportion(parts: Sequence[int], total: int) -> list[int]:
    """Integers in proportion to `parts`, none below one where it was not, with sum `total`."""
    scaled = [max(1, p * total // sum(parts)) if p else 0 for p in parts]
    for i in range(total - sum(scaled)):
        scaled[-1 - i % len(parts)] += 1
    return scaled


def _widths(part: PreTrainedConfig) -> set[int]:
    return {v for name, value in vars(part).items() if role_of(name) == "width" for v in ints(value)}


def _image_sizes(part: PreTrainedConfig) -> list[int]:
    return [v for name, value in vars(part).items() if role_of(name) == "image" for v in ints(value) if v > 0]


def _own_hidden(part: PreTrainedConfig) -> int | None:
    for name in ("hidden_size", "d_model", "n_embd", "embed_dim", "dim", "hidden_dim"):
        value = getattr(part, name, None)
        if isinstance(value, int) and value > 1:
            return value
    return None


def _hidden(config: PreTrainedConfig) -> float:
    """The width that decides the scale: the widest model's, or four times a pyramid's first."""
    parts = [part for _, part in tree(config)]
    pyramids = (getattr(part, n, None) for part in parts for n in ("hidden_sizes", "embed_dims", "embed_dim"))
    firsts = [4 * p[0] for p in pyramids if isinstance(p, (list, tuple)) and p]
    return max([h for part in parts if (h := _own_hidden(part))] or firsts or [WIDTH])


def listed_layers(part: PreTrainedConfig) -> set[int]:
    """The layers that the configuration's lists of indices name."""
    return {i for name, value in vars(part).items() if is_layer_index(name, value) for i in ints(value) if i >= 0}


def _own_depth(part: PreTrainedConfig) -> int | None:
    for name in ("num_hidden_layers", "num_layers", "depth", "n_layer"):
        value = getattr(part, name, None)
        if isinstance(value, int):
            return value
    return None


def depths(part: PreTrainedConfig) -> set[int]:
    """The counts of layers, without those that count the stages of a pyramid."""
    counts = {name: value for name, value in vars(part).items() if role_of(name) == "depth"}
    stages = {len(v) for v in counts.values() if isinstance(v, (list, tuple))}
    return {v for v in counts.values() if isinstance(v, int)} - stages


def _is_per_layer(part: PreTrainedConfig, name: str, value: Any) -> bool:
    return len(value) > 2 and len(value) in depths(part) and role_of(name) not in ("ids",)


def is_layer_index(name: str, value: Any) -> bool:
    listed = re.search(r"(layers|indexes|indices|idxs|layer_ids|blocks)$", name)
    single = re.search(r"^(vision_feature_layer|feature_layer|vision_feature_select_layer|spatial_vision_layer)$", name)
    if isinstance(value, (list, tuple)) and value and all(type(v) is int for v in value):
        return bool(single or (listed and list(value) == sorted(set(value))))
    return bool(single and isinstance(value, int))


def _head_pairs(part: PreTrainedConfig) -> dict[str, int]:
    """Head-width fields that have a count of heads beside them: name of the width -> the count."""
    counts = {
        "head_dim": ("num_attention_heads", "num_heads"),
        "v_head_dim": ("num_attention_heads",),
        "attention_head_dim": ("num_attention_heads",),
        "kv_channels": ("num_attention_heads",),
        "d_kv": ("num_heads",),
        "mamba_d_head": ("mamba_n_heads",),
        "mamba_headdim": ("n_mamba_heads",),
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
