"""A twin differs from its original in sizes alone, has every kind of layer, and runs."""

from __future__ import annotations

import functools
import subprocess
import sys

import pytest
import torch
import transformers
from torch import nn

from taut.shrink import CannotShrink, build_on_meta, example_inputs, shrink, tiny_model
from taut.shrink.kinds import kinds_of, missing_kinds
from taut.shrink.sizes import tree

LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
PATTERN = (["sliding_attention"] * 5 + ["full_attention"]) * 5 + ["sliding_attention"] * 4

# Configurations with the widths of published models.
FULL = {
    "LlamaForCausalLM": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "bos_token_id": 128000,
        "eos_token_id": [128001, 128008, 128009],
        "max_position_embeddings": 131072,
        "rope_parameters": LLAMA3_ROPE,
    },
    "MixtralForCausalLM": {"num_hidden_layers": 32, "sliding_window": 4096},
    "Gemma3ForCausalLM": {
        "hidden_size": 2560,
        "intermediate_size": 10240,
        "num_hidden_layers": 34,
        "num_attention_heads": 8,
        "num_key_value_heads": 4,
        "head_dim": 256,
        "layer_types": PATTERN,
    },
    "DeepseekV3ForCausalLM": {"num_hidden_layers": 12},
    "T5ForConditionalGeneration": {"feed_forward_proj": "gated-gelu", "tie_word_embeddings": False},
    "ViTForImageClassification": {"num_labels": 1000},
    "WhisperForConditionalGeneration": {},
    "BertForMaskedLM": {},
}


def full_size(name: str):
    model_class = getattr(transformers, name)
    return model_class, model_class.config_class(**FULL[name])


@functools.cache
def tiny(name: str) -> nn.Module:
    return tiny_model(*full_size(name))


def switches(config) -> dict:
    """Every field of every nested configuration that is no size."""
    kept = (bool, str, float, type(None))
    return {(p, n): v for p, part in tree(config) for n, v in vars(part).items() if isinstance(v, kept)}


def output_of(model: nn.Module, inputs: dict) -> torch.Tensor:
    with torch.no_grad():
        return model(**inputs).logits


@pytest.mark.parametrize("name", FULL)
def test_the_twin_differs_in_sizes_alone(name):
    model_class, config = full_size(name)
    twin, model = shrink(config, model_class), tiny(name)
    assert type(twin) is type(config)
    assert switches(twin) == switches(config)
    assert not missing_kinds(kinds_of(build_on_meta(model_class, config)), kinds_of(model))
    assert sum(p.numel() for p in model.parameters()) < 1_000_000


@pytest.mark.parametrize("name", FULL)
def test_the_twin_runs_and_reads_its_inputs(name):
    model = tiny(name)
    inputs = example_inputs(model)
    output = output_of(model, inputs)
    assert torch.isfinite(output).all()
    assert 1e-2 < output.std() < 1e2
    assert torch.equal(output, output_of(model, inputs))
    assert not torch.equal(output, output_of(model, example_inputs(model, seed=1)))
    assert not any((p == 0).all() or (p == 1).all() for p in model.parameters())


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "BertForMaskedLM"])
def test_the_mask_pads_one_row_and_is_honoured(name):
    model = tiny_model(getattr(transformers, name))
    inputs = example_inputs(model, batch=3, length=11)
    mask = inputs["attention_mask"].bool()
    assert mask[:2].all()
    assert mask[2].any()
    assert not mask[2].all()
    other = inputs | {"input_ids": torch.where(mask, inputs["input_ids"], inputs["input_ids"].flip(0))}
    assert torch.equal(output_of(model, inputs)[mask], output_of(model, other)[mask])


@pytest.mark.parametrize(("heads", "shared"), [(32, 32), (32, 8), (32, 1), (25, 25), (71, 1)])
def test_the_ratio_of_heads_survives(heads, shared):
    config = transformers.LlamaConfig(
        hidden_size=64 * heads, num_attention_heads=heads, num_key_value_heads=shared, num_hidden_layers=4
    )
    twin = shrink(config)
    assert (twin.num_key_value_heads == 1) == (shared == 1)
    assert (twin.num_key_value_heads == twin.num_attention_heads) == (shared == heads)
    assert twin.num_attention_heads * twin.head_dim == twin.hidden_size
    assert twin.num_attention_heads % twin.num_key_value_heads == 0


def test_shrinking_is_deterministic_and_leaves_the_original_alone():
    config = transformers.Gemma3TextConfig()
    before = config.to_dict()
    assert shrink(config).to_dict() == shrink(config).to_dict()
    assert config.to_dict() == before


def test_the_router_still_chooses():
    twin = shrink(transformers.DeepseekV3Config())
    assert twin.n_routed_experts % twin.n_group == 0
    assert 1 < twin.topk_group < twin.n_group
    assert twin.num_experts_per_tok < twin.topk_group * twin.n_routed_experts // twin.n_group
    assert twin.n_shared_experts == 1
    assert twin.qk_head_dim == twin.qk_nope_head_dim + twin.qk_rope_head_dim
    assert 0 < twin.first_k_dense_replace < twin.num_hidden_layers


def test_head_width_apart_from_the_hidden_width_stays_apart():
    twin = shrink(transformers.Gemma3TextConfig(hidden_size=2560, num_attention_heads=8, head_dim=256))
    assert twin.head_dim * twin.num_attention_heads != twin.hidden_size


def test_listed_layers_are_renumbered():
    twin = shrink(transformers.MllamaConfig())
    assert twin.text_config.cross_attention_layers == [1]
    assert twin.text_config.num_hidden_layers == 2


def test_a_layer_keeps_what_it_has_of_its_own(tmp_path):
    """Gemma 4's global layers have wider heads than its local ones; both kinds are in the twin, and on disk."""
    twin = tiny_model(transformers.Gemma4ForCausalLM)
    full = [kind == "full_attention" for kind in twin.config.layer_types]
    widths = [layer.head_dim for layer in twin.config.per_layer_config]
    assert set(full) == {True, False}
    assert all((width > min(widths)) == is_full for width, is_full in zip(widths, full, strict=True))
    assert [layer.self_attn.head_dim for layer in twin.model.layers] == widths
    twin.save_pretrained(tmp_path)
    again = transformers.Gemma4ForCausalLM.from_pretrained(tmp_path)
    assert all(torch.equal(again.state_dict()[name], value) for name, value in twin.state_dict().items())


def test_layers_that_share_parameters_still_share_them():
    model = tiny_model(transformers.Zamba2ForCausalLM)
    one, two = (layer.shared_transformer for layer in model.model.layers if hasattr(layer, "shared_transformer"))
    assert {id(p) for p in one.parameters()} & {id(p) for p in two.parameters()}


def test_rope_sections_follow_the_head_width():
    config = transformers.Qwen2VLConfig()
    config.text_config.rope_parameters["mrope_section"] = [16, 24, 24]
    text = shrink(config).text_config
    width = text.hidden_size // text.num_attention_heads
    assert sum(text.rope_parameters["mrope_section"]) == width // 2


def test_token_ids_stay_inside_the_vocabulary_and_apart():
    _, config = full_size("LlamaForCausalLM")
    twin = shrink(config)
    ids = [twin.bos_token_id, *twin.eos_token_id]
    assert len(set(ids)) == 4
    assert max(ids) < twin.vocab_size
    assert not set(ids) & set(example_inputs(tiny("LlamaForCausalLM"))["input_ids"].flatten().tolist())


def test_example_inputs_of_a_full_size_model_on_the_meta_device():
    model = build_on_meta(*full_size("LlamaForCausalLM"))
    inputs = example_inputs(model)
    assert {t.device.type for t in inputs.values()} == {"meta"}
    assert output_of(model, {"input_ids": inputs["input_ids"]}).shape == (2, 13, 128256)


def test_a_class_that_needs_two_kinds_of_input_gets_both_on_the_meta_device_too():
    model = build_on_meta(transformers.CLIPModel, transformers.CLIPConfig())
    assert {"input_ids", "pixel_values"} <= set(example_inputs(model))


def test_weights_take_the_dtype_and_the_seed():
    config = transformers.LlamaConfig()
    one, two = (tiny_model(transformers.LlamaForCausalLM, config, seed=s, dtype=torch.float64) for s in (0, 1))
    assert {p.dtype for p in one.parameters()} == {torch.float64}
    assert not torch.equal(one.lm_head.weight, two.lm_head.weight)


def test_a_class_that_cannot_be_built_says_why():
    with pytest.raises(CannotShrink, match="timm"):
        tiny_model(transformers.TimmBackbone)


def test_importing_taut_imports_no_transformers():
    code = "import sys, taut, taut.shrink; assert 'transformers' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)
