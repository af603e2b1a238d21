"""Lossy weights: what int8 and int4 cost a trained model, in perplexity and in divergence."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

import taut
from taut.checkpoint import BadInput
from taut.ops._numba.compressed import LOOKS_UP
from taut.ops._numba.simd import ROOMY
from taut.quality import Quality, compare
from taut.runtime.engine import Engine
from taut.shrink import tiny_model

STORIES = 40


class Teacher(nn.Module):
    """An engine as a model that is told every token."""

    def __init__(self, engine: Engine) -> None:
        super().__init__()
        self.engine = engine

    def forward(self, input_ids: Tensor) -> Tensor:
        length = input_ids.shape[1]
        slots = torch.zeros(length, dtype=torch.long)
        return self.engine.many.run(input_ids[0], torch.arange(length), slots)[None]


@pytest.fixture(scope="module")
def stories(weights) -> list[Tensor]:
    file = weights.parent / "data" / "tinystories_valid_30k.txt"
    if not file.is_file():
        pytest.skip("STORIES NOT TESTED: there is no data folder beside the weights")
    tokenizer = Tokenizer.from_file(str(weights / "stories260k" / "tokenizer.json"))
    texts = [text.strip()[:1600] for text in file.read_text(errors="ignore").split("\n")]
    return [torch.tensor([tokenizer.encode(t).ids[:512]]) for t in texts if len(t) > 200][:STORIES]


def lost(weights, stories, kind: str) -> Quality:
    before, after = (taut.compile(weights / "stories260k", weights=w) for w in (None, kind))
    return compare(Teacher(before), Teacher(after), stories)


def test_int8_costs_less_than_half_a_percent_of_perplexity(weights, stories):
    quality = lost(weights, stories, "int8")
    print(quality)
    assert abs(quality.perplexity_ratio - 1) < 0.005


def test_int4_costs_more_than_int8_and_is_still_the_model():
    """The demo model on Python that it has not seen."""
    demo = Path(taut.__file__).parent / "demo" / "model"
    tokenizer = Tokenizer.from_file(str(demo / "tokenizer.json"))
    ids = torch.tensor([tokenizer.encode(Path(__file__).read_text()).ids[:512]])
    engines = {kind: Teacher(taut.compile(demo, weights=kind)) for kind in ("fp32", "int8", "int4")}
    eight, four = (compare(engines["fp32"], engines[kind], [ids]) for kind in ("int8", "int4"))
    print(eight, four)
    assert eight.kl < four.kl / 10
    assert abs(eight.perplexity_ratio - 1) < 0.005
    assert four.perplexity_ratio < 2


@pytest.mark.parametrize(("weights_kind", "bytes_each"), [("int8", 1.0), ("int4", 0.5625), ("bf16", 2.0)])
def test_a_step_reads_as_many_bytes_as_the_weights_have(weights_kind, bytes_each):
    import transformers

    model = _model(transformers)
    full, small = (taut.compile(model, weights=w).bytes_a_step() for w in ("fp32", weights_kind))
    assert bytes_each / 4 <= small / full < bytes_each / 4 + 0.05


@pytest.mark.skipif(not LOOKS_UP, reason="COMPRESSED WEIGHTS NOT TESTED: no instruction looks up bytes")
@pytest.mark.parametrize(
    ("weights_kind", "bytes_each"), [("int8", 1.0), ("int4", 0.5625), ("bf16", 1.5), ("fp32", 3.5 if ROOMY else 4.0)]
)
def test_a_step_of_a_large_model_reads_compressed_weights(weights_kind, bytes_each, monkeypatch):
    import transformers

    monkeypatch.setattr("taut.runtime.placed.LARGE", 0)
    model = _model(transformers)
    multiplied = sum(p.numel() for name, p in model.named_parameters() if p.ndim == 2 and "embed" not in name)
    read = taut.compile(model, weights=weights_kind).bytes_a_step() / multiplied
    assert bytes_each <= read < 1.08 * bytes_each


def _model(transformers) -> nn.Module:
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4
    )
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(config).eval()


def test_the_interpreter_and_torch_agree_on_quantized_weights():
    import transformers

    for kind in ("int8", "int4", "fp16"):
        engine = taut.compile(_model(transformers), weights=kind, max_length=32)
        ids = torch.arange(3, 15)
        whole = engine.prefill(ids)
        engine.reset()
        for token in ids:
            each = engine.decode(token[None])
        torch.testing.assert_close(each[0], whole)


def test_groups_that_do_not_fit_are_refused():
    import transformers

    config = transformers.LlamaConfig(
        vocab_size=99, hidden_size=48, intermediate_size=80, num_hidden_layers=1, num_attention_heads=6
    )
    with pytest.raises(BadInput, match="groups of 32"):
        taut.compile(tiny_model(transformers.LlamaForCausalLM, config), weights="int4")
