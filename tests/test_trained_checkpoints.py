"""Trained checkpoints, rewritten in both forms: the metric that their own script prints must not move."""

from __future__ import annotations

import importlib.util
import re
from types import SimpleNamespace

import pytest
import torch
import transformers

import taut
from taut.tautform import load

EXPECTED = {"gpt2-nano-sort": "729/729"}
METRICS = {"stories260k": "stories", "gpt2-nano-sort": "sort", "rxnmapper-albert": "reactions"}


@pytest.fixture(scope="module")
def evaluate(weights):
    spec = importlib.util.spec_from_file_location("evaluate", weights / "evaluate.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def printed(evaluate, name, path, capsys) -> list[str]:
    capsys.readouterr()
    with torch.inference_mode():
        getattr(evaluate, METRICS[name])(path)
    return re.findall(r"[\d.]+(?:/\d+)?(?=\s|$)", capsys.readouterr().out)


class AsTransformers(torch.nn.Module):
    """A model in taut form behind the one call that the evaluation makes."""

    def __init__(self, path):
        super().__init__()
        self.model = load(path)

    def forward(self, input_ids):
        out = self.model(input_ids=input_ids, attention_mask=torch.ones_like(input_ids))
        return SimpleNamespace(logits=out["logits"])


@pytest.mark.parametrize("form", ["stock", "taut"])
@pytest.mark.parametrize("name", ["stories260k", "gpt2-nano-sort"])
def test_the_metric_does_not_move(name, form, weights, evaluate, tmp_path, capsys, monkeypatch):
    done = taut.apply(weights / name, out=tmp_path / "new", form=form)
    assert done.evidence.passed
    assert taut.verify(weights / name, tmp_path / "new").passed
    before = printed(evaluate, name, weights / name, capsys)
    if form == "taut":
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", AsTransformers)
    after = printed(evaluate, name, tmp_path / "new", capsys)
    assert len(before) == len(after) > 0
    if name in EXPECTED:
        assert after[-1] == EXPECTED[name]
    for one, two in zip(before, after, strict=True):
        if "/" not in one:
            assert float(two.rstrip(".")) == pytest.approx(float(one.rstrip(".")), rel=1e-6)


def test_a_post_norm_model_with_shared_layers_is_refused_where_it_must_be(weights, evaluate, tmp_path, capsys):
    found = taut.inspect(weights / "rxnmapper-albert")
    folds = {s["where"]: s["refused"] for s in found.sites if s["rewrite"] == "fold_norm"}
    assert [where for where, refused in folds.items() if refused is None] == ["albert.embeddings.LayerNorm"]
    shared = [reason for where, reason in folds.items() if "albert_layers" in where]
    assert len(shared) == 24
    assert all("add" in reason or "output" in reason for reason in shared)
    assert "tied" in folds["predictions.LayerNorm"]
    taut.apply(weights / "rxnmapper-albert", out=tmp_path / "new")
    assert printed(evaluate, "rxnmapper-albert", tmp_path / "new", capsys)[-1] == "0.9830"


@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
def test_what_lossy_weights_cost_on_stories(name, weights, tmp_path):
    text = weights.parent / "data" / "tinystories_valid_30k.txt"
    if not text.is_file():
        pytest.skip("STORIES NOT TESTED: there is no data folder beside the weights")
    done = taut.apply(weights / "stories260k", only=[name], form="taut", out=tmp_path / "new")
    assert done.evidence.passed
    evidence = taut.verify(weights / "stories260k", tmp_path / "new", text=text)
    print(evidence.bounds)
    assert evidence.passed, evidence
    assert 0.5 < evidence.bounds[f"{name}.of_noise"] < 2
    rise = evidence.bounds[f"{name}.perplexity_rise"]
    assert rise < (0.005 if name == "int8_weights" else 0.2)


@pytest.mark.parametrize("name", ["int8_weights", "int4_weights"])
@pytest.mark.parametrize("model", ["gpt2-nano-sort", "rxnmapper-albert"])
def test_lossy_weights_of_models_of_other_kinds(model, name, weights, evaluate, tmp_path, capsys, monkeypatch):
    """A sorter loses nothing; ALBERT's layers are shared."""
    done = taut.apply(weights / model, only=[name], form="taut", out=tmp_path / "new")
    evidence = taut.verify(weights / model, tmp_path / "new")
    print(evidence.bounds)
    assert done.evidence.passed
    assert evidence.passed, evidence
    if model in EXPECTED:
        monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", AsTransformers)
        assert printed(evaluate, model, tmp_path / "new", capsys)[-1] == EXPECTED[model]
