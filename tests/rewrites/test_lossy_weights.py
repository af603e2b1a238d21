"""int8_weights and int4_weights: hand-counted sites, the proof and what it refuses, and what is written to disk."""

from __future__ import annotations

import dataclasses
from typing import Any

import architectures
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from scales import traced

import taut
from taut import lossy
from taut.lossy import Loss, prove_plan, stretches, with_values
from taut.ops._weights import dequantize, quantize
from taut.ops.dequantize import dequantize as dequantize_op
from taut.plans import BadPlan, plan_and_apply
from taut.rewrite import STOCK, Exactness, rewrites
from taut.rewrites.int4_weights import int4_weights
from taut.rewrites.int8_weights import int8_weights
from taut.tautform import load
from taut.values import Affine

# Counted by hand from the modeling code, two layers each.
COUNTS = {
    "llama": 2 * 7 + 2,  # q, k, v, o, gate, up, down; embedding and head
    "gpt2": 2 * 4 + 1,  # c_attn, c_proj, c_fc, c_proj, stored (in, out); the tied table, and not that of positions
    "gpt_neox": 2 * 4 + 2,
    "cohere": 2 * 7 + 1,  # tied
    "mixtral": 2 * (4 + 1) + 2,  # the router; not the experts
}


@pytest.mark.parametrize("name", COUNTS)
def test_sites_are_those_counted_by_hand(name):
    _, lifted, _ = traced(name)
    found = int8_weights.find(lifted)
    assert sum(site.refused is None for site in found) == COUNTS[name]
    reasons = {site.refused for site in found} - {None}
    assert reasons == (
        {"experts' weights lie in one tensor, which no kernel reads as codes"} if name == "mixtral" else set()
    )
    assert all("multiple of 32" in str(site.refused) for site in int4_weights.find(lifted) if "attn.q" in site.where)


def test_they_run_only_when_asked_for_and_in_taut_form():
    _, lifted, _ = traced("llama")
    done, _ = plan_and_apply(lifted, "taut")
    assert not {"int8_weights", "int4_weights"} & {step.rewrite for step in done.steps}
    assert int8_weights.find(lifted, STOCK) == []
    with pytest.raises(BadPlan, match="--form taut"):
        plan_and_apply(lifted, "stock", only=["int8_weights"])


def small(kind: str, **more) -> Any:
    """Inputs in multiples of 32, so that every layer takes 4 bits."""
    torch.manual_seed(0)
    if kind == "gpt2":
        config = transformers.GPT2Config(n_embd=64, n_layer=2, n_head=4, vocab_size=99, n_positions=64)
        return transformers.GPT2LMHeadModel(config).eval()
    sizes = {"hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=99, num_key_value_heads=2, initializer_range=0.1, **sizes, **more)
    return transformers.LlamaForCausalLM(config).eval()


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
def test_the_proof_passes_and_says_what_was_lost(kind, name):
    model = small(kind)
    new = taut.apply(model, only=["fold_norm", "merge_linears", name], form="taut")
    evidence = taut.verify(model, new)
    assert evidence.passed, evidence
    assert evidence.exactness == "BOUNDED"
    assert 0.5 < evidence.bounds[f"{name}.of_noise"] < 2
    again, _ = plan_and_apply(new.graph, "taut", only=["fold_norm", "merge_linears", name])
    assert again.steps == ()


def test_every_output_is_that_of_the_rounded_weights():
    model, ids = small("gpt2"), torch.arange(3, 15)[None]
    new = taut.apply(model, only=["int4_weights"], form="taut")
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.ndim == 2 and "wpe" not in name:
                turned = "wte" not in name
                codes = quantize(weight.mT if turned else weight, 4)
                rounded = dequantize(*codes, torch.float32)
                weight.copy_(rounded.mT if turned else rounded)
        theirs, ours = model(input_ids=ids).logits, new(input_ids=ids, attention_mask=torch.ones_like(ids))["logits"]
    torch.testing.assert_close(ours, theirs)


def test_an_embedding_looks_up_rows_of_codes():
    """The table of an untied model is never decoded whole."""
    _, lifted, inputs = traced("llama")
    after = int8_weights.apply(lifted)
    sources = [node.all_input_nodes[0] for node in after.calls(dequantize_op)]
    whole = [source.meta["tensor"] for source in sources if source.op == "placeholder"]
    assert len(whole) == COUNTS["llama"] - 1
    assert "model.embed_tokens.weight.codes" not in whole
    rows = next(source for source in sources if source.op != "placeholder")
    assert tuple(rows.meta["val"].shape) == (*inputs["input_ids"].shape, 48)
    assert "model.embed_tokens.weight" not in after.values


def test_a_tensor_that_is_off_is_found(monkeypatch):
    model = small("llama")
    new = taut.apply(model, only=["int8_weights"], form="taut")
    key = "model/layers/1/mlp/up_proj/weight/scale"
    with torch.no_grad():
        new.weights[key][3] *= 1.01
    evidence = taut.verify(model, new)
    assert not evidence.passed
    assert evidence.wrong_tensors == [key.replace("/", ".")]
    with torch.no_grad():
        new.weights[key][3] /= 1.01
        new.weights["lm_head/weight/codes"][5, 6] += 1
    assert taut.verify(model, new).wrong_tensors == ["lm_head.weight.codes"]


def prove(kind: str, name: str, monkeypatch=None):
    raw, lifted, inputs = traced(kind)
    made, _ = plan_and_apply(lifted, "taut", only=[name])
    return prove_plan(raw, lifted, made, [inputs], promises={}, exactness=Exactness.BOUNDED)[0]


def test_losing_more_than_noise_does_is_refused(monkeypatch):
    assert prove("llama", "int8_weights").passed
    kept = lossy.stretches

    def worse(*args):
        exact, (loss,) = kept(*args)
        left = {name: Affine(value, 1.02, 0.0) for name, value in loss.left.values.items()}
        return exact, [dataclasses.replace(loss, left=with_values(loss.left, left))]

    monkeypatch.setattr(lossy, "stretches", worse)
    evidence = prove("llama", "int8_weights")
    assert not evidence.passed
    assert any("times as far as noise" in note for note in evidence.notes)


def test_codes_that_are_read_wrongly_are_refused(monkeypatch):
    """The behind part must compute with what is said to be left: here the scale is read as if it were larger."""
    kept = lossy.stretches

    def wrong(*args):
        exact, losses = kept(*args)
        after = exact[-1][1]
        name = "model.layers.0.mlp.up_proj.weight.scale"
        return [*exact[:-1], (exact[-1][0], with_values(after, {name: Affine(after.values[name], 1.01, 0.0)}))], losses

    monkeypatch.setattr(lossy, "stretches", wrong)
    evidence = prove("llama", "int8_weights")
    assert not evidence.passed
    assert evidence.float64_error > 1e-6


def test_a_plan_without_a_loss_is_one_stretch():
    raw, lifted, _ = traced("llama")
    made, _ = plan_and_apply(lifted, "taut")
    exact, losses = stretches(raw, lifted, made)
    assert len(exact) == 1
    assert not losses
    made, _ = plan_and_apply(lifted, "taut", only=["fold_norm", "int8_weights"])
    exact, losses = stretches(raw, lifted, made)
    assert [type(loss) for loss in losses] == [Loss]
    assert len(exact) == 2
    assert rewrites()["int8_weights"].bound is losses[0].bound


@pytest.mark.parametrize(("kind", "tied"), [("llama", False), ("llama", True), ("gpt2", True)])
@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
def test_on_disk_they_are_plain_tensors(kind, tied, name, tmp_path):
    model = small(kind, **({"tie_word_embeddings": tied} if kind == "llama" else {})).bfloat16()
    model.save_pretrained(tmp_path / "old")
    done = taut.apply(tmp_path / "old", only=[name], form="taut", out=tmp_path / "new")
    assert done.evidence.passed
    stored = load_file(tmp_path / "new" / "taut-00001-of-00001.safetensors")
    coded = [key.removesuffix(".codes") for key in stored if key.endswith(".codes")]
    assert len(coded) == sum(len(step.sites) for step in done.plan.steps)
    for key in coded:
        codes, scale = stored[f"{key}.codes"], stored[f"{key}.scale"]
        weight = model.get_parameter(key)
        weight = weight.mT if kind == "gpt2" and "wte" not in key else weight
        theirs = quantize(weight, 8 if name == "int8_weights" else 4)
        assert (codes.dtype, scale.dtype) == (theirs[0].dtype, theirs[1].dtype)
        assert torch.equal(codes, theirs[0])
        assert torch.equal(scale, theirs[1])
    assert taut.verify(tmp_path / "old", tmp_path / "new").passed
    loaded, ids = load(tmp_path / "new"), torch.arange(3, 15)[None]
    kind_of: Any = type(model)
    original = kind_of.from_pretrained(tmp_path / "old", dtype="auto").eval()
    in_memory = taut.apply(original, only=[name], form="taut")
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    assert torch.equal(loaded(**given)["logits"], in_memory(**given)["logits"])
    key = next(key for key in stored if key.endswith("codes"))
    stored[key] ^= 1
    save_file(stored, tmp_path / "new" / "taut-00001-of-00001.safetensors")
    assert not taut.verify(tmp_path / "old", tmp_path / "new").passed


def test_architectures_of_all_kinds_are_proved_or_refused():
    for name in ("qwen3", "gemma2"):
        raw, lifted, inputs = traced(name)
        made, _ = plan_and_apply(lifted, "taut", only=["int8_weights"])
        assert made.applied
        evidence, _ = prove_plan(raw, lifted, made, [inputs], promises={}, exactness=Exactness.BOUNDED)
        assert evidence.passed, (name, evidence)
    assert architectures.NAMES
