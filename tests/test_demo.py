import json
import math
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel, LlamaForCausalLM, PreTrainedModel

import taut

DEMO = Path(taut.__file__).parent / "demo"
MODELS = {"model": (LlamaForCausalLM, 8_000_000), "layernorm": (GPT2LMHeadModel, 4_000_000)}
TEXTS = [
    "def f(self, x):\n    return self.value_map[x]\n\n\nclass A:\n\tpass  # é ∑ 漢 🙂\r\n",
    "  leading and trailing space \n\n\n ",
    "".join(map(chr, range(1, 256))),
]

pytestmark = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(autouse=True)
def offline(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def load(name: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()


def record(name: str) -> dict:
    return json.loads((DEMO / name / "training.json").read_text())


def test_fits_and_is_complete(name: str) -> None:
    files = [p for p in (DEMO / name).rglob("*") if p.is_file()]
    assert sum(p.stat().st_size for p in files) <= MODELS[name][1]
    wanted = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "README.md", "LICENSE"}
    assert wanted <= {p.name for p in files}


def test_every_weight_is_read_by_the_stock_class(name: str) -> None:
    model, info = AutoModelForCausalLM.from_pretrained(DEMO / name, output_loading_info=True)
    assert type(model) is MODELS[name][0]
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert sum(p.numel() for p in model.parameters()) == record(name)["parameters"]


def test_gains_and_biases_are_trained(name: str) -> None:
    for key, p in load(name).named_parameters():
        if p.ndim == 1:
            assert p.isfinite().all(), key
            assert p.std() > 0, key


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trips(name: str, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(DEMO / name)
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text
    assert len(tokenizer) == load(name).config.vocab_size


@torch.no_grad()
def test_perplexity_of_the_heldout_text_is_the_recorded_one(name: str) -> None:
    model, tokenizer, recorded = load(name), AutoTokenizer.from_pretrained(DEMO / name), record(name)["excerpt"]
    text = (DEMO / "heldout.txt").read_text()
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text)["input_ids"]]])
    context, total = model.config.max_position_embeddings, 0.0
    for start in range(0, ids.shape[1] - 1, context):
        window = ids[:, start : start + context + 1]
        log_p = model(input_ids=window[:, :-1]).logits.double().log_softmax(-1)
        total -= log_p.gather(-1, window[:, 1:, None]).sum().item()
    assert recorded["tokens"] == ids.shape[1]
    # The record has four decimals, and float32 logits move the fifth.
    assert abs(math.exp(total / (ids.shape[1] - 1)) - recorded["perplexity"]) < 1e-4
    assert abs(total / math.log(2) / len(text.encode()) - recorded["bits_per_byte"]) < 1e-4


def test_beats_a_compressor_that_has_seen_nothing(name: str) -> None:
    import lzma

    text = (DEMO / "heldout.txt").read_bytes()
    assert record(name)["excerpt"]["bits_per_byte"] < 8 * len(lzma.compress(text)) / len(text)


def test_training_is_recorded(name: str) -> None:
    training, data = record(name), json.loads((DEMO / "data.json").read_text())
    rows = data["packages"]
    read = sum(row["bytes"] for row in rows if not row["held_out"])
    assert read == data["totals"]["train_bytes"] >= 100_000_000
    assert sum(row["bytes"] for row in rows if row["held_out"]) == data["totals"]["held_out_bytes"] > 0
    assert all(row["version"] and row["licence"] for row in rows)
    assert training["passes"] <= 2
    assert training["loss_curve"][-1][1] < training["loss_curve"][0][1]
    assert "H200" in training["device"]
