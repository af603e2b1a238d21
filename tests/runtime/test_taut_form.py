"""Checkpoints in taut form, exact and lossy: compiled, they say what the original says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers

import taut
from taut.checkpoint import BadInput
from taut.shrink import tiny_model

LENGTH = 48


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


CLASSES = [
    "LlamaForCausalLM",
    "GPT2LMHeadModel",
    "Qwen3ForCausalLM",
    "Phi3ForCausalLM",
    pytest.param("Gemma2ForCausalLM", marks=pytest.mark.slow),
    pytest.param("GPTNeoXForCausalLM", marks=pytest.mark.slow),
    pytest.param("CohereForCausalLM", marks=pytest.mark.slow),
    pytest.param("Olmo2ForCausalLM", marks=pytest.mark.slow),
]


def saved(name: str, folder) -> str:
    model: Any = tiny_model(getattr(transformers, name))
    model.save_pretrained(folder)
    return str(folder)


def forced(engine) -> torch.Tensor:
    ids = torch.randint(3, 60, (24,), generator=torch.Generator().manual_seed(1))
    engine.reset()
    logits = [engine.prefill(ids[:7])] + [engine.decode(token[None])[0].clone() for token in ids[7:]]
    return torch.stack(logits)


@pytest.mark.parametrize("name", CLASSES)
def test_exact_and_in_eight_bits(name, tmp_path):
    old = saved(name, tmp_path / "old")
    for only, out, weights in ((None, "exact", None), (["int8_weights"], "int8", "int8")):
        done = taut.apply(old, only=only, form="taut", out=tmp_path / out)
        assert done.evidence.passed
        ours = taut.compile(tmp_path / out, max_length=LENGTH)
        theirs = taut.compile(old, max_length=LENGTH, weights=weights)
        if weights:
            assert ours.bytes_a_step() == theirs.bytes_a_step()
        torch.testing.assert_close(forced(ours), forced(theirs), atol=2e-5, rtol=1e-4)
    both = taut.compile(tmp_path / "int8", max_length=LENGTH)  # from the kept step
    torch.testing.assert_close(forced(both), forced(ours), atol=0, rtol=0)


def test_codes_can_be_widened_when_compiled(tmp_path):
    old = saved("LlamaForCausalLM", tmp_path / "old")
    taut.apply(old, only=["int8_weights"], form="taut", out=tmp_path / "new")
    wide, narrow = (taut.compile(tmp_path / "new", max_length=LENGTH, weights=w) for w in ("fp32", None))
    assert wide.bytes_a_step() > 3 * narrow.bytes_a_step()
    torch.testing.assert_close(forced(wide), forced(narrow), atol=2e-5, rtol=1e-4)


def test_a_plan_that_does_not_fit_the_step_says_so(tmp_path):
    old = saved("LlamaForCausalLM", tmp_path / "old")
    taut.apply(old, form="taut", out=tmp_path / "new")
    text = (tmp_path / "new" / "taut.json").read_text()
    (tmp_path / "new" / "taut.json").write_text(text.replace("model.layers.1.input_layernorm", "model.layers.9.norm"))
    with pytest.raises(BadInput, match="does not fit the decoding step") as caught:
        taut.compile(tmp_path / "new", max_length=LENGTH)
    assert "stock form" in caught.value.cure
