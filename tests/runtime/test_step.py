"""The step of a model, fused and lowered, computes what the model computes: judged by the model in float64."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from torch import Tensor

from taut.graph import Graph
from taut.lift import lift
from taut.plans import BadPlan, choose
from taut.proof import AS_GOOD, SAME_FUNCTION
from taut.rewrite import STEP, TAUT, rewrites
from taut.rewrites.cache_heads import cache_heads
from taut.runtime.engine import Engine
from taut.runtime.lower import lower
from taut.runtime.plain import PlainRunner
from taut.runtime.prepare import prepared, tidied
from taut.runtime.runner import Runner
from taut.runtime.step import trace_step
from taut.runtime.steps import Program, Torch
from taut.shrink import tiny_model

QUICK = (
    "LlamaForCausalLM",
    "Gemma3ForCausalLM",  # softmax scale, QK norms, post-norms, sliding windows, scaled embeddings
    "Gemma2ForCausalLM",  # softcaps
    "GPT2LMHeadModel",  # LayerNorm, biases, learned positions, transposed weights
    "Phi3ForCausalLM",  # query, key and value in one weight; gate and up too
    "MixtralForCausalLM",  # experts
    "GptOssForCausalLM",  # sinks
    "DeepseekV3ForCausalLM",  # latent attention, grouped experts
    "RobertaForCausalLM",  # positions that depend on the token
    "GPTNeoXForCausalLM",  # a parallel block, heads interleaved in one weight, a part of the head turned
)
SLOW = (
    "BloomForCausalLM",  # ALiBi
    "MistralForCausalLM",
    "Qwen2ForCausalLM",
    "Qwen3ForCausalLM",
    "Qwen3MoeForCausalLM",
    "CohereForCausalLM",
    "OPTForCausalLM",
    "Olmo2ForCausalLM",
    "StableLmForCausalLM",
    "FalconForCausalLM",
    "GraniteForCausalLM",
    "GPTJForCausalLM",
    "Starcoder2ForCausalLM",
    "GlmForCausalLM",
    "SmolLM3ForCausalLM",
    "PhiForCausalLM",
    "GPTBigCodeForCausalLM",
    "NemotronForCausalLM",
    "PersimmonForCausalLM",
    "CodeGenForCausalLM",  # neighbours turned, scaled after the mask
    "DiffLlamaForCausalLM",  # two attentions over one cache
    "MiniCPM3ForCausalLM",
    "BertLMHeadModel",
)
LENGTH, STEPS = 64, 64
CLASSES = [*QUICK, *(pytest.param(name, marks=pytest.mark.slow) for name in SLOW)]


@functools.cache
def built(name: str):
    import transformers

    model = tiny_model(getattr(transformers, name))
    if getattr(model.config, "is_decoder", None) is False:
        model.config.is_decoder = True
        model = tiny_model(type(model), model.config)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    return model


@functools.cache
def step(name: str) -> Graph:
    return trace_step(built(name), LENGTH)


@functools.cache
def program(name: str) -> Program:
    return lower(prepared(step(name)))


@functools.cache
def judged(name: str) -> tuple[Tensor, Tensor, Tensor]:
    """Token ids, the model's logits in true float64, and in float32."""
    model = built(name)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (STEPS,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        own = model(input_ids=ids[None], use_cache=False).logits[0]
        true = copy.deepcopy(model).double()(input_ids=ids[None], use_cache=False).logits[0]
    return ids, true, own


def error(logits: Tensor, true: Tensor) -> float:
    return float((logits.double() - true).norm() / true.norm())


@pytest.mark.parametrize("name", CLASSES)
def test_fusing_keeps_the_function(name):
    """In true float64, on a cache of random keys and values."""
    graph, fused = lift(tidied(step(name))), prepared(step(name))
    if cache_heads.find(graph, STEP):
        pytest.skip("its caches hold something else afterwards: see tests/rewrites/test_cache_heads.py")
    generator = torch.Generator().manual_seed(0)
    inputs = {key: torch.randn(node.meta["val"].shape, generator=generator) for key, node in _inputs(graph).items()}
    inputs |= {"token": torch.tensor([[5]]), "position": torch.tensor([40])}
    true, new = graph.run(inputs, float64=True)["logits"], fused.run(inputs, float64=True)["logits"]
    assert float((new - true).abs().max() / true.abs().max()) <= SAME_FUNCTION


def _inputs(graph: Graph):
    return graph.placeholders("input")


@pytest.mark.parametrize("name", CLASSES)
def test_teacher_forced_logits_are_as_good_as_the_model_s_own(name):
    ids, true, own = judged(name)
    limit = AS_GOOD * error(own, true)
    runner = Runner(program(name), 1)
    zero = torch.zeros(1, dtype=torch.long)
    each = [runner.run(ids[i : i + 1], zero + i, zero).clone() for i in range(STEPS)]
    assert error(torch.cat(each), true) <= limit
    whole = PlainRunner(program(name), 1).run(ids, torch.arange(STEPS), torch.zeros(STEPS, dtype=torch.long))
    assert error(whole, true) <= limit


@pytest.mark.parametrize("name", CLASSES)
def test_a_ragged_batch_of_three_is_as_good_as_each_alone(name):
    """Prompts of 1, 50 and 13 tokens, then eight steps together, each row at its own position."""
    ids, true, own = judged(name)
    engine = Engine(program(name), 3)
    lengths = [1, 50, 13]
    found = [engine.prefill(ids[:length], slot)[None] for slot, length in enumerate(lengths)]
    places = [[length - 1] for length in lengths]
    for step in range(8):
        now = [length + step for length in lengths]
        for slot, row in enumerate(engine.decode(ids[now])):
            found[slot] = torch.cat((found[slot], row[None]))
            places[slot].append(now[slot])
    for slot, place in enumerate(places):
        assert error(found[slot], true[place]) <= AS_GOOD * max(error(own[place], true[place]), error(own, true))


def test_what_has_no_word_is_named():
    whys = [step.why for step in program("MixtralForCausalLM").steps if isinstance(step, Torch)]
    assert sum("topk" in why for why in whys) == 2  # a router a layer
    assert sum("no word for experts" in why for why in whys) == 4  # two products a layer
    assert not any(isinstance(step, Torch) for step in program("GPTNeoXForCausalLM").steps)


@pytest.mark.parametrize(
    "rewrite", ["fuse_glu", "fuse_norm_linear", "fuse_residual", "fuse_rope_cache", "decode_attention"]
)
def test_sites_of_a_llama_counted_by_hand(rewrite):
    """Two layers: q, k, v, gate and up with the head behind norms; two sums a layer; one of the rest a layer."""
    sites = rewrites()[rewrite].find(lift(tidied(step("LlamaForCausalLM"))), STEP)
    counted = {"fuse_norm_linear": 2 * 5 + 1, "fuse_residual": 2 * 2}
    assert [site.refused for site in sites] == [None] * counted.get(rewrite, 2)


def test_fusing_is_not_for_checkpoints():
    with pytest.raises(BadPlan, match="compiled for decoding"):
        choose(["fuse_glu"], TAUT)
    assert not [r for r in choose(None, TAUT) if STEP in r.forms]


def test_a_wrong_table_is_noticed():
    """The judge can fail: one rotary angle off."""
    ids, true, own = judged("LlamaForCausalLM")
    wrong = copy.deepcopy(program("LlamaForCausalLM"))
    attend = next(step for step in wrong.steps if hasattr(step, "rotary"))
    attend.rotary.cos[1, 0] *= 1.01
    whole = PlainRunner(wrong, 1).run(ids, torch.arange(STEPS), torch.zeros(STEPS, dtype=torch.long))
    assert error(whole, true) > AS_GOOD * error(own, true)


@pytest.mark.parametrize("name", ["LlamaForCausalLM", "GPT2LMHeadModel"])
def test_a_gain_that_was_folded_away_and_a_bias_of_nothing_are_not_looked_at(name):
    folded = copy.deepcopy(built(name))
    for module in folded.modules():
        if hasattr(module, "weight") and module.weight.ndim == 1:
            module.weight.data.fill_(1)
            if getattr(module, "bias", None) is not None:
                module.bias.data.zero_()
    norms = [step.norm for step in program(name).steps if getattr(step, "norm", None) is not None]
    found = lower(prepared(trace_step(folded, LENGTH)))
    left = [step.norm for step in found.steps if getattr(step, "norm", None) is not None]
    assert len(left) == len(norms) > 2
    assert all(norm.gain is not None for norm in norms)
    assert all(norm.gain is None and norm.bias is None for norm in left)
    ids = judged(name)[0]
    with torch.no_grad():
        own = folded(input_ids=ids[None], use_cache=False).logits[0]
        true = copy.deepcopy(folded).double()(input_ids=ids[None], use_cache=False).logits[0]
    logits = PlainRunner(found, 1).run(ids, torch.arange(STEPS), torch.zeros(STEPS, dtype=torch.long))
    assert error(logits, true) <= AS_GOOD * error(own, true)
