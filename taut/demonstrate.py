"""The main job on the model that comes with taut: inspect, apply, verify, and a comparison that anybody can read."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taut import api

DEMO = Path(__file__).parent / "demo"
MODEL = DEMO / "model"
PROMPT = "def __init__(self, name):\n        "
FOLD = "fold_norm"
SAME = (
    "The same model, with less to compute. In float64 both agree to {:.0e}. The last digits of the perplexity "
    "differ because bfloat16 stores each folded weight rounded once."
)


@dataclass
class Demonstration:
    """The table's rows (what, before, after), and whether the proof passed."""

    passed: bool
    rows: list[tuple[str, str, str]]
    verdict: str
    evidence: dict[str, Any]
    applied: int
    refused: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def demonstrate(out: Path | None, say: Callable[[Any], None]) -> Demonstration:
    """Run it all, in a temporary directory unless `out` is given. `say` is told each step, then what came of it."""
    with tempfile.TemporaryDirectory() as scratch:
        target = out or Path(scratch) / "rewritten"
        say("1. taut inspect: which norms can be folded into the layers behind them?")
        found = api.inspect(MODEL)
        say(found)
        say("2. taut apply: fold them, prove it on a small twin, write the checkpoint")
        done = api.apply(MODEL, out=target, only=[FOLD])
        say(done)
        say("3. taut verify: prove it on the model itself, from what stands on disk")
        evidence = api.verify(MODEL, target)
        say(evidence)
        say("4. both models, loaded by transformers without taut")
        rows = compare(MODEL, target)
    norms = sum(site["rewrite"] == FOLD for site in found.sites)
    left = norms - done.plan.applied
    rows.insert(0, ("norms that multiply by a gain", str(norms), str(left)))
    verdict = SAME.format(evidence.float64_error) if evidence.passed else "The proof FAILED: please report this."
    return Demonstration(evidence.passed, rows, verdict, evidence.as_dict(), done.plan.applied, left)


def compare(before: Path, after: Path) -> list[tuple[str, str, str]]:
    """Perplexity on held-out text and a greedy continuation, before and after."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(before)
    models = [AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval() for path in (before, after)]
    text = (DEMO / "heldout.txt").read_text()
    perplexities = [perplexity(model, tokenizer, text) for model in models]
    lines = [continuation(model, tokenizer) for model in models]
    return [
        ("perplexity on held-out text", f"{perplexities[0]:.4f}", f"{perplexities[1]:.4f}"),
        (f"continues '{PROMPT.strip()}' with", lines[0], lines[1]),
    ]


def perplexity(model: Any, tokenizer: Any, text: str) -> float:
    """Of a text after the start token, in windows of the model's context that overlap by one token."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(text).input_ids]])
    context, loss = model.config.max_position_embeddings, 0.0
    with torch.inference_mode():
        for start in range(0, ids.shape[1] - 1, context):
            window = ids[:, start : start + context + 1]
            logits = model(input_ids=window[:, :-1]).logits[0].double()
            loss += nn.functional.cross_entropy(logits, window[0, 1:], reduction="sum").item()
    return math.exp(loss / (ids.shape[1] - 1))


def continuation(model: Any, tokenizer: Any, length: int = 8) -> str:
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.inference_mode():
        for _ in range(length):
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], 1)
    return tokenizer.decode(ids[0]).removeprefix(PROMPT).strip().splitlines()[0]
