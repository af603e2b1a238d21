"""What emulated norms and softmaxes cost the demo models in perplexity, each put in the place of the model's own.

    python benchmarks/units.py [--out benchmarks/results/units.json]

The models of `taut/demo`: `model`, with RMSNorm, and `layernorm`, its twin with LayerNorm; 2048 tokens of the held-out
text, float32 but for the unit. Takes about a minute.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taut.demonstrate import DEMO
from taut.lift import lift
from taut.module import GraphModule
from taut.nn.emulate.softmax import GuaranteedSoftmax
from taut.nn.norm.guaranteed_layer_norm import GuaranteedLayerNorm
from taut.nn.norm.iter_l2_norm import IterL2Norm
from taut.nn.norm.mx import MXNorm
from taut.nn.norm.rms_norm import RMSNorm
from taut.quality import compare
from taut.redundancy import ids_of
from taut.rewrites.swap_norm import swapping
from taut.tracing import trace

RECORD = Path(__file__).parent / "results" / "units.json"
ROW, ROWS = 256, 8

Factory = Callable[[str, int, float], nn.Module]

NORMS: dict[str, tuple[str, Factory]] = {
    **{f"IterL2Norm, {n} steps": ("layernorm", lambda _, d, eps, n=n: IterL2Norm(d, eps, steps=n)) for n in (2, 3, 5)},
    "IterL2Norm, 5 steps, bfloat16": ("layernorm", lambda _, d, eps: IterL2Norm(d, eps, dtype=torch.bfloat16)),
    "IterL2Norm, 10 Euler steps": ("layernorm", lambda _, d, eps: IterL2Norm(d, eps, steps=10, scheme="flow")),
    **{
        f"guaranteed LayerNorm, {bits} fraction bits": (
            "layernorm",
            lambda _, d, eps, bits=bits: GuaranteedLayerNorm(d, fraction_bits=bits),
        )
        for bits in (4, 8, 12)
    },
    "MXNorm, from its blocks": ("model", lambda _, d, eps: MXNorm(d, eps)),
    "MXNorm, exact": ("model", lambda _, d, eps: MXNorm(d, eps, estimate="exact")),
    "pRMSNorm, 6.25 %": ("model", lambda _, d, eps: RMSNorm(d, eps, gain="none", partial=0.0625)),
}

SOFTMAXES = {
    **{f"guaranteed softmax, {bits} bits": GuaranteedSoftmax(bits) for bits in (8, 12, 16)},
    "softmax by a table of reciprocals, 8 bits": GuaranteedSoftmax(8, guarantee=False),
}


def measured() -> list[dict[str, Any]]:
    from transformers import AutoModelForCausalLM

    rows = []
    for name in ("layernorm", "model"):
        model = AutoModelForCausalLM.from_pretrained(DEMO / name, dtype=torch.float32).eval()
        batches = ids_of(DEMO / name, DEMO / "heldout.txt", ROW)[:ROWS]
        graph = lift(trace(model, {"input_ids": batches[0]}))
        ways = {unit: swapping(factory) for unit, (of, factory) in NORMS.items() if of == name}
        ways |= {unit: swapping(None, softmax) for unit, softmax in SOFTMAXES.items() if name == "model"}
        for unit, rewrite in ways.items():
            found = compare(model, GraphModule(rewrite.apply(graph)), batches)
            rows.append({"unit": unit, "model": name} | vars(found) | {"sites": len(rewrite.find(graph))})
            print(f"{name:10} {unit:44} {found.perplexity_before:.4f} -> {found.perplexity_after:.4f}", flush=True)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=RECORD)
    arguments = parser.parse_args()
    torch.set_num_threads(2)
    arguments.out.write_text(json.dumps({"torch": torch.__version__, "rows": measured()}, indent=1) + "\n")


if __name__ == "__main__":
    main()
