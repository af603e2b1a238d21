"""Generate text from Python: compile a model once, then stream tokens from it.

    python examples/generate.py [MODEL] [--prompt TEXT] [--tokens N] [--temperature T] [--weights int8]

MODEL is a directory or a hub id; by default the small model of code that comes with taut.
"""

from __future__ import annotations

import argparse
import time

from transformers import AutoTokenizer

import taut
from taut.demonstrate import MODEL


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    options.add_argument("model", nargs="?", default=str(MODEL))
    options.add_argument("--prompt", default="def __init__(self, name):\n        ")
    options.add_argument("--tokens", type=int, default=32)
    options.add_argument("--temperature", type=float, default=0.0)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--weights", default=None, help="fp32, bf16, fp16, int8 or int4; by default as they are")
    given = options.parse_args()

    tokenizer = AutoTokenizer.from_pretrained(given.model)
    prompt = tokenizer(given.prompt)["input_ids"]
    engine = taut.compile(given.model, max_length=len(prompt) + given.tokens, weights=given.weights)

    start, tokens, shown = time.perf_counter(), [], ""
    print(given.prompt, end="", flush=True)
    for token in engine.generate(prompt, given.tokens, temperature=given.temperature, seed=given.seed):
        tokens.append(token)
        text = tokenizer.decode(tokens)  # of all tokens: one alone may be half a character
        print(text[len(shown) :], end="", flush=True)
        shown = text
    seconds = time.perf_counter() - start
    print(f"\n\n{len(tokens)} tokens, {len(tokens) / seconds:.0f} a second")


if __name__ == "__main__":
    main()
