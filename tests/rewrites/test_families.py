"""Fourteen families, each against itself in true float64: every rewrite is exact, or says why not."""

import independent
import pytest
import transformers
from judge import SAME, computed, error

from taut.lift import lift
from taut.plans import plan_and_apply
from taut.rewrite import STOCK, TAUT, Exactness, rewrites
from taut.shrink import example_inputs, tiny_model
from taut.tracing import trace

FAMILIES = {
    "Llama": {},
    "Mistral": {},
    "Qwen2": {},  # biases on queries, keys and values
    "Qwen3": {},
    "Phi3": {},  # fused products
    "Gemma": {},  # 1 + w
    "Gemma2": {},
    "Gemma3": {},
    "Olmo2": {},
    "Mixtral": {},
    "DeepseekV2": {},
    "DeepseekV2, queries from the stream itself": {"q_lora_rank": None, "num_experts_per_tok": 2},
    "GPT2": {},
    "OPT": {},
    "Cohere": {},  # one norm for attention and feed-forward
}


def model_of(family: str):
    name = family.split(",")[0]
    kind = getattr(transformers, name + ("LMHeadModel" if name == "GPT2" else "ForCausalLM"))
    options = FAMILIES[family]
    model = tiny_model(kind, kind.config_class(**options) if options else None)
    model.config.use_cache = False
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_every_rewrite_is_exact_or_refuses_in_words(family: str):
    model = model_of(family)
    inputs = example_inputs(model)
    true = independent.outputs(model, inputs)
    lifted = lift(trace(model, inputs, outputs="logits"))
    for form in ("stock", "taut"):
        plan, after = plan_and_apply(lifted, form)
        assert plan.applied
        assert error(computed(after, inputs), true) <= SAME
    exact = [r for r in rewrites().values() if r.exactness is Exactness.ALGEBRAIC and not r.promises]
    for rewrite in exact:
        for form in (STOCK, TAUT):
            sites = rewrite.find(lifted, form)
            assert all(site.refused is None or site.refused.strip() for site in sites)
            if any(site.refused is None for site in sites):
                after = rewrite.apply(lifted, form=form)
                assert error(computed(after, inputs), true) <= SAME, (rewrite.name, form.name)
