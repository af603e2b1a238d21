"""Prompts on a CPU: 512 tokens of a SmolLM2-135M-shaped Llama with random weights, peers in one run.

    python benchmarks/prefill_cpu.py [--only taut,transformers,llama.cpp] [--formats fp32,bf16,int8,int4]
                                     [--rounds 8] [--json FILE]

All take turns, each from an empty cache to the logits behind the last token; the time is the median over the rounds.
transformers computes in the dtype of the weights, eager and by torch's attention; llama.cpp joins where `llama_cpp`
and `gguf` can be imported. The model and the weights are those of `decode_cpu.py`.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import decode_cpu as model
import torch
from torch import Tensor

from taut.machine import cpu_name
from taut.runtime.engine import Engine

TOKENS, LONGEST = 512, 1024
PRODUCTS = 2 * TOKENS * model.LAYERS * model.HIDDEN * (2 * (model.HEADS + model.KV_HEADS) * model.D + 3 * model.FFN)
Turn = Callable[[Tensor], Tensor]
"""The last token's logits of a prompt."""


@dataclass(frozen=True)
class Row:
    name: str
    ms: float
    best_ms: float
    tokens_per_s: float
    gflop_per_s: float
    """Of the products with the layers' weights alone."""


def taut_turn(weights: model.Weights, form: str) -> Turn:
    engine = Engine(model.llama(weights, model.FORMATS[form], LONGEST), 1)

    def turn(prompt: Tensor) -> Tensor:
        engine.reset()
        return engine.prefill(prompt)

    return turn


def transformers_turn(weights: model.Weights, form: str, attention: str) -> Turn:
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=model.HIDDEN, intermediate_size=model.FFN, num_hidden_layers=model.LAYERS,
        num_attention_heads=model.HEADS, num_key_value_heads=model.KV_HEADS, head_dim=model.D,
        vocab_size=model.VOCABULARY, max_position_embeddings=LONGEST, rms_norm_eps=model.EPS, rope_theta=model.BASE,
        tie_word_embeddings=True, attn_implementation=attention,
    )  # fmt: skip
    made = transformers.LlamaForCausalLM(config).eval()
    named = {f"model.{name}.weight": value for name, value in weights.items()}
    made.load_state_dict(named | {"lm_head.weight": weights["embed_tokens"]}, strict=False)
    dtype: Any = model.FORMATS[form]
    for parameter in made.parameters():
        parameter.data = parameter.data.to(dtype)
    return lambda prompt: made(prompt[None], use_cache=True, logits_to_keep=1).logits[0, -1]


def llama_cpp_turn(weights: model.Weights, form: str, folder: Path) -> Turn:
    import llama_cpp
    import numpy as np

    path = folder / f"{form}.gguf"
    model.write_gguf(weights, form, path)
    threads = torch.get_num_threads()
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if form == "fp32" else {}
    sizes = {"n_ctx": LONGEST, "n_batch": TOKENS, "n_ubatch": TOKENS}
    made = llama_cpp.Llama(str(path), n_threads=threads, n_threads_batch=threads, verbose=False, **sizes, **kinds)

    def turn(prompt: Tensor) -> Tensor:
        made.reset()
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(made.ctx), True)
        made.eval(prompt.tolist())
        found = np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(made.ctx, -1), (model.VOCABULARY,))
        return torch.from_numpy(found.copy())

    return turn


def players(weights: model.Weights, only: list[str], formats: list[str], folder: Path) -> dict[str, Turn]:
    found: dict[str, Turn] = {}
    cpp = "llama.cpp" in only and model.llama_cpp_here()
    for form in formats:
        if "taut" in only:
            found[f"taut {form}"] = taut_turn(weights, form)
        if cpp:
            found[f"llama.cpp {form}"] = llama_cpp_turn(weights, form, folder)
        if "transformers" in only and isinstance(model.FORMATS[form], torch.dtype):
            for attention in ("eager", "sdpa"):
                found[f"transformers {form} {attention}"] = transformers_turn(weights, form, attention)
    return found


def check_parity(logits: dict[str, Tensor]) -> None:
    """All compute the same function, up to what their dtype loses. Raises SystemExit where one does not."""
    limits = {"fp32": 1e-4, "bf16": 0.1, "int8": 0.15, "int4": 1.0}
    exact = next((y for name, y in logits.items() if "fp32" in name), None)
    for name, y in logits.items():
        off = 0.0 if exact is None else float((y.float() - exact.float()).norm() / exact.float().norm())
        if off > limits[name.split()[1]]:
            raise SystemExit(f"{name} is off by {off:.1e}")


def interleaved(turns: dict[str, Turn], prompt: Tensor, rounds: int) -> list[Row]:
    times: dict[str, list[float]] = {name: [] for name in turns}
    for _ in range(rounds):
        for name, turn in turns.items():
            start = time.perf_counter()
            turn(prompt)
            times[name].append(time.perf_counter() - start)
    rows = []
    for name, found in times.items():
        median = statistics.median(found)
        rows.append(Row(name, median * 1e3, min(found) * 1e3, TOKENS / median, PRODUCTS / median / 1e9))
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="taut,transformers,llama.cpp")
    parser.add_argument("--formats", default=",".join(model.FORMATS))
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--json")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    weights = model.random_weights()
    prompt = torch.randint(model.VOCABULARY, (TOKENS,), generator=torch.Generator().manual_seed(1))
    with tempfile.TemporaryDirectory() as folder:
        turns = players(weights, options.only.split(","), options.formats.split(","), Path(folder))
        check_parity({name: turn(prompt) for name, turn in turns.items()})
        rows = interleaved(turns, prompt, options.rounds)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, {TOKENS} tokens")
    for row in rows:
        print(f"{row.name:24} {row.ms:7.1f} ms (best {row.best_ms:6.1f})  {row.tokens_per_s:6.0f} tokens/s")
    if options.json:
        record = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
        record |= {"python": platform.python_version(), "tokens": TOKENS, "rows": [asdict(row) for row in rows]}
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
