"""Twelve architectures of different kinds, tiny, two layers each, with random gains and biases."""

from __future__ import annotations

import torch
from torch import nn

SIZES = {
    "hidden_size": 48,
    "intermediate_size": 80,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "vocab_size": 99,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
GROUPED = SIZES | {"num_key_value_heads": 2}


def _options() -> dict[str, tuple[str, dict]]:
    return {
        "llama": ("LlamaForCausalLM", GROUPED),
        "qwen2": ("Qwen2ForCausalLM", GROUPED),
        "qwen3": ("Qwen3ForCausalLM", GROUPED | {"head_dim": 8}),
        "gemma2": ("Gemma2ForCausalLM", GROUPED | {"head_dim": 8}),
        "olmo2": ("Olmo2ForCausalLM", GROUPED),
        "mixtral": ("MixtralForCausalLM", GROUPED | {"num_local_experts": 4}),
        "deepseek_v3": (
            "DeepseekV3ForCausalLM",
            SIZES
            | {
                "num_key_value_heads": 6,
                "moe_intermediate_size": 32,
                "n_routed_experts": 8,
                "n_group": 2,
                "topk_group": 1,
            }
            | {"num_experts_per_tok": 2, "first_k_dense_replace": 1, "q_lora_rank": 24, "kv_lora_rank": 16}
            | {"qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8},
        ),
        "gpt_neox": ("GPTNeoXForCausalLM", SIZES),
        "gpt2": ("GPT2LMHeadModel", {"n_embd": 48, "n_head": 6, "n_layer": 2, "vocab_size": 99, "n_positions": 64}),
        "gpt2_untied": (
            "GPT2LMHeadModel",
            {
                "n_embd": 48,
                "n_head": 6,
                "n_layer": 2,
                "vocab_size": 99,
                "n_positions": 64,
                "tie_word_embeddings": False,
            },
        ),
        "bert": ("BertForMaskedLM", SIZES),
        "t5": (
            "T5ForConditionalGeneration",
            {"d_model": 48, "d_ff": 80, "num_layers": 2, "num_heads": 6, "d_kv": 8, "vocab_size": 99},
        ),
        "vit": ("ViTForImageClassification", SIZES | {"image_size": 16, "patch_size": 4}),
        "cohere": ("CohereForCausalLM", GROUPED),
        "mamba": ("MambaForCausalLM", SIZES | {"state_size": 4}),
    }


NAMES = tuple(_options())


def build(name: str, dtype: torch.dtype = torch.float32) -> nn.Module:
    """The named architecture in eval mode; every vector is random, no gain is one."""
    import transformers

    class_name, sizes = _options()[name]
    model_class = getattr(transformers, class_name)
    torch.manual_seed(0)
    known = {k: v for k, v in sizes.items() if k != "vocab_size" or "image_size" not in sizes}
    model = model_class(model_class.config_class(**known)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model.to(dtype)


def inputs(model: nn.Module, seed: int = 0, batch: int = 2, length: int = 7) -> dict[str, torch.Tensor]:
    """Made-up inputs with padding in the second row."""
    generator = torch.Generator().manual_seed(seed)
    if model.main_input_name == "pixel_values":
        return {"pixel_values": torch.randn(batch, 3, 16, 16, generator=generator)}
    ids = torch.randint(3, 99, (batch, length), generator=generator)
    mask = torch.ones(batch, length, dtype=torch.long)
    mask[1, length - 2 :] = 0
    made = {"input_ids": ids, "attention_mask": mask}
    if model.config.is_encoder_decoder:
        made["decoder_input_ids"] = torch.randint(3, 99, (batch, length - 2), generator=generator)
    if "Mamba" in type(model).__name__:
        del made["attention_mask"]
    return made
