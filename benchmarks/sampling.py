"""Drawing a token from a head of (4096, 151936) on a GPU: taut's kernel against compiled multinomial, in one run.

    python benchmarks/sampling.py [--out benchmarks/results/h200/sampling.json]

With the final norm on all sides. Ids first: against the float64 reference of the same seed on a smaller head, and the
share of ties among maxima; then CUDA graphs, replayed in turn.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.nn import sampling
from taut.ops._triton.launch import sample_lm_head
from taut.ops._triton.timing import microseconds

K, VOCABULARY, EPS = 4096, 151_936, 1e-6
BYTES_PER_S = 4.8e12


def parity(draws: int = 40) -> dict[str, int]:
    """How many ids differ from the reference's, over rows of several temperatures."""
    torch.manual_seed(0)
    h = torch.randn(64, 512, device="cuda").bfloat16()
    weight = (torch.randn(20_000, 512, device="cuda") / 8).bfloat16()
    heat = torch.rand(64, device="cuda") * 2
    heat[::7] = 0
    differ = 0
    for seed in range(draws):
        expected = sampling.sample_lm_head(h.double(), weight.double(), heat, seed=seed, step=3 * seed)
        ids, _ = sample_lm_head(h, weight, heat, torch.tensor([seed, 3 * seed], device="cuda"))
        differ += int((ids != expected.ids).sum())
    return {"draws": 64 * draws, "differ": differ}


def chi_square(draws: int = 10_000_000, vocabulary: int = 512) -> float:
    """The p-value of as many draws from one distribution."""
    from scipy.stats import chisquare

    torch.manual_seed(1)
    h, weight = torch.randn(1, 64, device="cuda").bfloat16(), torch.randn(vocabulary, 64, device="cuda").bfloat16() / 6
    rows, counts = 1 << 16, torch.zeros(vocabulary, device="cuda", dtype=torch.int64)
    many, heat = h.expand(rows, -1).contiguous(), torch.ones(rows, device="cuda")
    for step in range(-(-draws // rows)):
        ids, _ = sample_lm_head(many, weight, heat, torch.tensor([9, step], device="cuda"))
        counts += torch.bincount(ids, minlength=vocabulary)
    expected = (h.double() @ weight.double().T).softmax(-1)[0] * counts.sum()
    return float(chisquare(counts.cpu().numpy(), expected.cpu().numpy()).pvalue)


def multinomial(x: Tensor, weight: Tensor, heat: Tensor) -> Tensor:
    logits = F.linear(F.rms_norm(x, (K,), eps=EPS), weight).float()
    return torch.multinomial((logits / heat[:, None]).softmax(-1), 1)


def row(batch: int, weights: list[Tensor]) -> dict:
    x, heat = torch.randn(batch, K, device="cuda").bfloat16(), torch.ones(batch, device="cuda")
    key = torch.tensor([5, 7], device="cuda")
    torch._dynamo.reset()
    compiled = torch.compile(multinomial, dynamic=False)
    calls = {
        "taut": lambda i: sample_lm_head(x, weights[i], heat, key, None, EPS),
        "compiled": lambda i: compiled(x, weights[i], heat),
        "product": lambda i: F.linear(x, weights[i]),
    }
    times = dict(zip(calls, microseconds(list(calls.values()), len(weights), 15), strict=True))
    slack = round(times["taut"] / (weights[0].nbytes / BYTES_PER_S * 1e6), 2)
    return {"batch": batch, "us": {name: round(us, 2) for name, us in times.items()}, "slack": slack}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/sampling.json"))
    args = parser.parse_args()
    ids, p = parity(), chi_square()
    print(ids, "chi-square p", p)
    weights = [torch.randn(VOCABULARY, K, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    rows = []
    for batch in (1, 4, 16, 64):
        rows.append(found := row(batch, weights))
        gain = found["us"]["compiled"] / found["us"]["taut"]
        print(f"batch {batch:3} {found['us']}  gain {gain:.2f}  slack {found['slack']}", flush=True)
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ids": ids, "chi_square_p": p}
    args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
