"""`taut plan`, `apply` and `verify`: that they agree, and that what is wrong is not proved."""

from __future__ import annotations

import json

import architectures
import independent
import pytest
import torch
import transformers
from cli.commands import WEIGHTS, as_json, contents, copy, run
from safetensors.torch import load_file, save_file

from taut.tautform import load


def test_verify(model, rewritten):
    found = as_json("verify", model, rewritten)
    assert found["passed"] is True
    assert found["exactness"] == "ALGEBRAIC"
    assert found["float64_error"] <= 1e-12
    assert found["error_ratio"] <= 2
    assert isinstance(found["worst"], str)
    assert "proved" in run("verify", model, rewritten).stdout


def test_the_rewritten_checkpoint_is_the_same_model(model, rewritten):
    before, after = (transformers.LlamaForCausalLM.from_pretrained(path) for path in (model, rewritten))
    assert independent.distance(before, after, architectures.inputs(before)) < 1e-6
    folded = load_file(rewritten / WEIGHTS)["model.layers.0.input_layernorm.weight"]
    assert torch.equal(folded, torch.ones(48))


def test_twice_gives_the_same_bytes(model, rewritten, tmp_path):
    as_json("apply", model, "--out", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(rewritten)


def test_full_size_proof(model, rewritten, tmp_path):
    found = as_json("apply", model, "--out", tmp_path / "new", "--verify", "--threads", "1")
    assert "proved on the full-size model" in found["evidence"]["notes"]
    assert contents(tmp_path / "new")[WEIGHTS] == contents(rewritten)[WEIGHTS]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_was_tampered_with(model, rewritten, tmp_path, name):
    new = copy(rewritten, tmp_path / "new")
    tensors = load_file(new / WEIGHTS)
    tensors[name][3, 5] += 1e-6
    save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    found = as_json("verify", model, new, code=1)
    assert found["passed"] is False
    assert name in found["wrong_tensors"]
    assert "NOT proved" in run("verify", model, new).stdout


def test_without_a_record_there_is_a_comparison_and_no_proof(model, tmp_path):
    new = copy(model, tmp_path / "new")
    found = as_json("verify", model, new, code=1)
    assert found["passed"] is False
    assert found["float64_error"] == 0.0
    assert found["error_ratio"] is None
    printed = run("verify", model, new)
    assert printed.exit_code == 1
    assert "no record" in printed.stdout
    assert "logits differs by 0.000e+00" in printed.stdout


def test_a_model_of_another_vocabulary_is_no_pair(model, tmp_path):
    config = transformers.AutoConfig.from_pretrained(model)
    config.vocab_size = 2
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "other")
    said = run("verify", model, tmp_path / "other")
    assert said.exit_code == 2
    assert "does not run on BEFORE's inputs" in said.stderr
    assert "compare the right pair" in said.stderr


@pytest.mark.parametrize("form", ["stock", "taut"])
def test_where_nothing_applies_nothing_is_written(model, tmp_path, form):
    asked = ("apply", model, "--out", tmp_path / "new", "--only", "fold_qk_norm_gain", "--form", form)
    found = as_json(*asked)
    assert (found["out"], found["applied"]) == (None, [])
    assert found["absent"]["fold_qk_norm_gain"]
    printed = run(*asked)
    assert printed.exit_code == 0
    assert "nothing was written" in printed.stdout
    assert not list(tmp_path.iterdir())


def test_applying_again_writes_nothing(rewritten, tmp_path):
    found = as_json("apply", rewritten, "--out", tmp_path / "new")
    assert (found["out"], found["applied"]) == (None, [])
    assert {r["reason"] for r in found["refused"]} >= {"already folded: its gain is one"}
    assert not list(tmp_path.iterdir())


def test_plan_round_trip(model, rewritten, tmp_path):
    plan = as_json("plan", model, "--only", "fold_norm", "--out", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    applied = as_json("apply", model, "--out", tmp_path / "new", "--plan", tmp_path / "plan.json")
    assert {site["where"] for site in applied["applied"]} == set(plan["steps"][0]["sites"])
    assert contents(tmp_path / "new")[WEIGHTS] == contents(rewritten)[WEIGHTS]
    plan["steps"][0]["sites"] = plan["steps"][0]["sites"][:1]
    (tmp_path / "one.json").write_text(json.dumps(plan))
    as_json("apply", model, "--out", tmp_path / "one", "--plan", tmp_path / "one.json")
    assert load_file(tmp_path / "one" / WEIGHTS)["model.layers.1.input_layernorm.weight"].std() > 0


def test_taut_form_round_trip(model, tmp_path):
    applied = as_json("apply", model, "--out", tmp_path / "new", "--form", "taut")
    assert {"fold_norm", "merge_linears", "defer_norm"} <= {site["rewrite"] for site in applied["applied"]}
    assert as_json("verify", model, tmp_path / "new")["passed"] is True
    stock = transformers.LlamaForCausalLM.from_pretrained(model)
    given = architectures.inputs(stock, batch=3, length=9)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "new")(**given)["logits"], stock(**given).logits)


def test_a_taut_form_of_structure_alone(model, tmp_path):
    """Deferring a division changes no tensor, and is something to write all the same."""
    plan = as_json("plan", model, "--form", "taut", "--only", "defer_norm", "--out", tmp_path / "plan.json")
    assert plan["steps"]
    applied = as_json("apply", model, "--out", tmp_path / "new", "--plan", tmp_path / "plan.json")
    assert applied["out"] == str(tmp_path / "new")
    assert as_json("verify", model, tmp_path / "new")["passed"] is True


def test_outputs_logits_gives_up_the_hidden_state(model, tmp_path):
    applied = as_json("apply", model, "--out", tmp_path / "new", "--outputs", "logits")
    assert {"rewrite": "fold_norm", "where": "model.norm"} in applied["applied"]
    found = as_json("verify", model, tmp_path / "new")
    assert (found["passed"], list(found["outputs"])) == (True, ["logits"])


def test_untie(tmp_path):
    tied = architectures.build("qwen3")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    kept = as_json("apply", tmp_path / "tied", "--out", tmp_path / "kept", "--outputs", "logits")
    assert "tied" in next(r["reason"] for r in kept["refused"] if r["where"] == "model.norm")
    untied = as_json("apply", tmp_path / "tied", "--out", tmp_path / "new", "--outputs", "logits", "--untie")
    assert {"rewrite": "fold_norm", "where": "model.norm"} in untied["applied"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["tie_word_embeddings"] is False
    assert as_json("verify", tmp_path / "tied", tmp_path / "new")["passed"] is True
    after = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "new")
    given = architectures.inputs(after)
    with torch.no_grad():
        torch.testing.assert_close(after(**given).logits, tied.eval()(**given).logits)


def test_force_replaces(model, rewritten, tmp_path):
    new = copy(model, tmp_path / "new")
    (new / "old.txt").write_text("old")
    as_json("apply", model, "--out", new, "--force")
    assert contents(new) == contents(rewritten)


def test_interruption_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("taut.checkpoint.write.Streamer", interrupt)
    result = run("apply", model, "--out", tmp_path / "new")
    assert result.exit_code == 130
    assert "nothing was left behind" in result.stderr
    assert not list(tmp_path.iterdir())
