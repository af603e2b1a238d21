"""Norm then project on a GPU: taut's kernels against torch's, Liger's if installed, and the vendor's, in one run.

    python benchmarks/norm_project.py [--out benchmarks/results/h200/norm_project.json] [--tokens 1 16 64 256 1024 4096]

Parity first: the error against float64 must be at most twice that of torch's norm and product. Then every way is
captured as a CUDA graph of many calls, each on a weight of its own from memory, and the graphs are replayed in turn.
taut's kernels may start while the one before them ends (programmatic dependent launch); torch's cannot.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import math
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from kernels_table import best_peer
from torch import Tensor

from taut import machine
from taut.ops._triton.timing import copies_for, microseconds
from taut.ops._triton.tune import Shape, inputs, vendor
from taut.ops.norm_glu import norm_glu
from taut.ops.norm_linear import norm_linear

SHAPES = (Shape(576, 960), Shape(2048, 2560), Shape(4096, 6144), Shape(4096, 28672), Shape(4096, 14336, "glu"))
PROJECTIONS = SHAPES[:3]
EPS = 1e-6


def taut(x: Tensor, weight: Tensor, up: Tensor | None) -> Tensor:
    return norm_linear(x, weight, eps=EPS) if up is None else norm_glu(x, weight, up, eps=EPS)


def product(x: Tensor, weight: Tensor, up: Tensor | None) -> object:
    """The vendor's products alone."""
    return F.linear(x, weight) if up is None else (F.linear(x, weight), F.linear(x, up))


def liger() -> ModuleType | None:
    """Liger's RMSNorm kernels, if they are installed."""
    found = importlib.util.find_spec("liger_kernel")
    return None if found is None else importlib.import_module("liger_kernel.ops.rms_norm")


def peers(k: int) -> dict[str, Callable[[Tensor, Tensor, Tensor | None], Tensor]]:
    """Every way of others to a norm without a gain and a product."""
    ways: dict[str, Callable] = {"torch": vendor, "compiled": torch.compile(vendor, dynamic=False)}
    kernels, gain = liger(), torch.ones(k, device="cuda", dtype=torch.bfloat16)
    if kernels is not None:

        def normed(x: Tensor, weight: Tensor, up: Tensor | None) -> Tensor:
            h = kernels.rms_norm_forward(x, gain, EPS, 0.0, "llama", None)[0]
            return F.linear(h, weight) if up is None else F.silu(F.linear(h, weight)) * F.linear(h, up)

        ways["Liger"] = normed
    return ways


def parity(ways: dict, x: Tensor, weight: Tensor, up: Tensor | None) -> dict[str, float]:
    wide = [None if t is None else t.double() for t in (x, weight, up)]
    truth = vendor(*wide, eps=EPS)
    errors = {name: float((way(x, weight, up).double() - truth).norm() / truth.norm()) for name, way in ways.items()}
    assert errors["taut"] <= 2 * errors["torch"], errors
    return errors


def row(shape: Shape, tokens: int, device: machine.Machine) -> dict:
    torch._dynamo.reset()
    ways = {"taut": taut, **peers(shape.k)}
    weights = 2 if shape.kind == "glu" else 1
    copies = copies_for(2 * weights * shape.n * shape.k, least=4, most=64)
    x, many, ups = inputs(shape, tokens, copies)
    errors = parity(ways, x, many[0], ups[0])
    ways["product"] = product
    calls = [lambda i, way=way: way(x, many[i], ups[i]) for way in ways.values()]
    times = dict(zip(ways, microseconds(calls, copies, 15), strict=True))
    op, args = (norm_linear, (x, many[0])) if ups[0] is None else (norm_glu, (x, many[0], ups[0]))
    assert op.work is not None
    implementation = next(name for name, verdict in op.explain(*args) if verdict in ("fits", "always fits"))
    return {
        **shape._asdict(),
        "tokens": tokens,
        "implementation": implementation,
        "us": {name: round(us, 3) for name, us in times.items()},
        "errors": errors,
        "slack": round(device.slack(times["taut"] * 1e-6, op.work(*args), torch.bfloat16), 2),
    }


def summary(rows: list[dict]) -> dict[str, float]:
    """The geometric mean over the three q/k/v shapes of the best peer's time over taut's, by token count."""
    gains = {}
    for tokens in dict.fromkeys(r["tokens"] for r in rows):
        own = [r for r in rows if r["tokens"] == tokens and (r["k"], r["n"]) in {(s.k, s.n) for s in PROJECTIONS}]
        logs = [math.log(best_peer(r["us"]) / r["us"]["taut"]) for r in own]
        gains[str(tokens)] = round(math.exp(sum(logs) / len(logs)), 3)
    return gains


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/norm_project.json"))
    parser.add_argument("--tokens", type=int, nargs="*", default=[1, 16, 64, 256, 1024, 4096])
    args = parser.parse_args()
    device, rows = machine.load("h200-sxm"), []
    for tokens in args.tokens:
        for shape in SHAPES:
            rows.append(found := row(shape, tokens, device))
            times = "  ".join(f"{name} {us:8.2f}" for name, us in found["us"].items())
            place = f"{shape.kind} ({shape.k}, {shape.n}) x {tokens}"
            print(f"{place:28} {times}  slack {found['slack']}  {found['implementation']}", flush=True)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "gain": summary(rows)}
        args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")
    print("gain over the best peer, geometric mean of the q/k/v shapes:", summary(rows))


if __name__ == "__main__":
    main()
