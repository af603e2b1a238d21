"""What the tests of scale degrees share: traced models, once each, and the scale oracle."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import architectures
import pytest
import torch
from torch import fx, nn

from taut.facts.degree import NORMS
from taut.graph import Graph
from taut.lift import lift
from taut.tracing import trace

L = nn.Linear
WIDTH = 16


@functools.cache
def traced(name: str, outputs: str = "all") -> tuple[Graph, Graph, dict[str, torch.Tensor]]:
    """The graph of an architecture as traced, as lifted, and inputs."""
    model = architectures.build(name) if name in architectures.NAMES else _build(name)
    inputs = architectures.inputs(model)
    raw = trace(model, inputs, outputs=outputs)
    return raw, lift(raw), inputs


OTHERS = {
    "gemma": ("GemmaForCausalLM", architectures.GROUPED | {"head_dim": 8}),
    "gemma3": ("Gemma3ForCausalLM", architectures.GROUPED | {"head_dim": 8, "sliding_window": 4}),
    "gemma4": (
        "Gemma4ForCausalLM",
        architectures.GROUPED
        | {"head_dim": 8, "global_head_dim": 8, "num_global_key_value_heads": 2, "num_kv_shared_layers": 0}
        | {"hidden_size_per_layer_input": 0, "sliding_window": 4},
    ),
    "opt": ("OPTForCausalLM", architectures.SIZES | {"ffn_dim": 80, "word_embed_proj_dim": 48}),
    "opt_untied": (
        "OPTForCausalLM",
        architectures.SIZES
        | {"ffn_dim": 80, "word_embed_proj_dim": 48, "max_position_embeddings": 62, "tie_word_embeddings": False},
    ),
}


SLOW = ("gemma", "olmo2", "mixtral", "mamba", "gpt_neox", "opt", "bert", "t5")


def some(names: Iterable[str]) -> list[Any]:
    """The names as test parameters; tracing takes most of the time, so half of the architectures are slow tests."""
    return [pytest.param(name, marks=pytest.mark.slow) if name in SLOW else name for name in names]


def _build(name: str) -> nn.Module:
    import transformers

    class_name, sizes = OTHERS[name]
    model_class = getattr(transformers, class_name)
    config_class = model_class.config_class
    if name == "gemma4":
        config_class = transformers.Gemma4TextConfig
    torch.manual_seed(0)
    model = model_class(config_class(**sizes)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter += 0.3 * torch.randn_like(parameter)
    return model


@torch.no_grad()
def redraw(model: nn.Module) -> nn.Module:
    """Every parameter random, the same every time; gains around one."""
    generator = torch.Generator().manual_seed(1)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise / parameter.shape[-1] ** 0.5)
        else:
            parameter.copy_(name.endswith("weight") + 0.3 * noise)
    return model


class Body(nn.Module):
    """A function of x with layers of its own."""

    def __init__(self, body, **layers: nn.Module):
        super().__init__()
        self.body = body
        for name, layer in layers.items():
            setattr(self, name, layer)
        redraw(self)

    def forward(self, x):
        return self.body(self, x)


def hand_made(body, width: int = WIDTH, **layers: nn.Module) -> tuple[Graph, Graph, dict[str, torch.Tensor]]:
    inputs = {"x": torch.randn(2, 6, width, generator=torch.Generator().manual_seed(3))}
    raw = trace(Body(body, **layers).eval(), inputs)
    return raw, lift(raw), inputs


def moves_the_outputs(graph: Graph, norm: fx.Node, inputs: dict[str, torch.Tensor]) -> bool:
    """The scale oracle: no epsilons, and a random positive scalar for every token of one norm."""
    bare = graph.copy()
    for node in bare.calls(*NORMS):
        node.args = (*node.args[:-1], 0.0)

    def differs(seed):
        generator = torch.Generator().manual_seed(seed)

        def scaled(node, value, value_of):
            if node.name != norm.name:
                return value
            noise = torch.randn(*value.shape[:-1], 1, generator=generator, dtype=value.dtype)
            return value * noise.mul(1.5).exp()

        after = bare.run(inputs, float64=True, watch=scaled)
        return any((after[k] - v).abs().max() > 1e-9 * v.abs().max() for k, v in before.items())

    before = bare.run(inputs, float64=True)
    return any(differs(seed) for seed in range(4))
