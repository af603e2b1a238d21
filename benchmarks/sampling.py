"""Drawing a token from a head of (4096, 151936) on a GPU: taut's kernel against compiled multinomial, in one run.

    python benchmarks/sampling.py [--out benchmarks/results/h200/sampling.json] [--tune]

With the final norm on all sides; also among the 50 greatest logits only. Ids first: against the float64 reference of
the same seed on a smaller head, and the share of draws whose two best noisy logits are equal: of logits that are all
equal it is about vocabulary / 2^33 for words of 32 bits, of others what float32 rounds together. Then CUDA graphs,
replayed in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.nn import sampling
from taut.ops._triton.launch import Config, drawn, sample_lm_head
from taut.ops._triton.timing import microseconds

K, VOCABULARY, EPS, KEPT = 4096, 151_936, 1e-6, 50
BYTES_PER_S = 4.8e12
FLAT = Config(64, 64, 16, 1, 2, 4)


def parity(draws: int = 40, k: int | None = None) -> dict[str, int]:
    """How many ids differ from the reference's, over rows of several temperatures."""
    torch.manual_seed(0)
    h = torch.randn(64, 512, device="cuda").bfloat16()
    weight = (torch.randn(20_000, 512, device="cuda") / 8).bfloat16()
    heat = torch.rand(64, device="cuda") * 2
    heat[::7] = 0
    differ = 0
    for seed in range(draws):
        expected = sampling.sample_lm_head(h.double(), weight.double(), heat, seed=seed, k=k, step=3 * seed)
        ids, _ = sample_lm_head(h, weight, heat, torch.tensor([seed, 3 * seed], device="cuda"), top_k=k)
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


def ties(flat: bool, draws: int = 10_000_000, rows: int = 1024, vocabulary: int = VOCABULARY) -> dict[str, float]:
    """How often the greatest of as many equal, or random, logits is reached twice; two tokens of one tile are not told
    apart."""
    torch.manual_seed(2)
    h, weight = torch.randn(rows, 16, device="cuda").half(), torch.randn(vocabulary, 16, device="cuda").half() / 4
    if flat:
        h.zero_()
    heat, equal = torch.ones(rows, device="cuda"), torch.zeros((), device="cuda", dtype=torch.int64)
    for step in range(-(-draws // rows)):
        noisy = drawn(h, weight, heat, torch.tensor([11, step], device="cuda"), None, None, FLAT)[0]
        first, second = noisy.topk(2, 0).values
        equal += (first == second).sum()
    shown = {"draws": step * rows + rows, "tied": int(equal), "share": int(equal) / (step * rows + rows)}
    return shown | ({"expected_share": vocabulary / 2**33} if flat else {})


def multinomial(x: Tensor, weight: Tensor, heat: Tensor) -> Tensor:
    logits = F.linear(F.rms_norm(x, (K,), eps=EPS), weight).float()
    return torch.multinomial((logits / heat[:, None]).softmax(-1), 1)


def among_few(x: Tensor, weight: Tensor, heat: Tensor) -> Tensor:
    logits, ids = F.linear(F.rms_norm(x, (K,), eps=EPS), weight).topk(KEPT)
    drawn = torch.multinomial((logits.float() / heat[:, None]).softmax(-1), 1)
    return ids.gather(1, drawn)


def row(batch: int, weights: list[Tensor]) -> dict:
    x, heat = torch.randn(batch, K, device="cuda").bfloat16(), torch.ones(batch, device="cuda")
    key = torch.tensor([5, 7], device="cuda")
    torch._dynamo.reset()
    compiled, of_few = (torch.compile(f, dynamic=False) for f in (multinomial, among_few))
    calls = {
        "taut": lambda i: sample_lm_head(x, weights[i], heat, key, None, EPS),
        "compiled": lambda i: compiled(x, weights[i], heat),
        "product": lambda i: F.linear(x, weights[i]),
        f"taut of {KEPT}": lambda i: sample_lm_head(x, weights[i], heat, key, None, EPS, top_k=KEPT),
        f"compiled of {KEPT}": lambda i: of_few(x, weights[i], heat),
    }
    times = dict(zip(calls, microseconds(list(calls.values()), len(weights), 15), strict=True))
    slack = round(times["taut"] / (weights[0].nbytes / BYTES_PER_S * 1e6), 2)
    return {"batch": batch, "us": {name: round(us, 2) for name, us in times.items()}, "slack": slack}


def tune(batch: int, weights: list[Tensor]) -> None:
    """Print the fastest configurations with their microseconds, beside the product alone."""
    x, heat = torch.randn(batch, K, device="cuda").bfloat16(), torch.ones(batch, device="cuda")
    key, least = torch.tensor([5, 7], device="cuda"), max(16, min(batch, 64))
    draw = lambda i, config: sample_lm_head(x, weights[i], heat, key, None, EPS, config=config)  # noqa: E731
    wanted, calls = draw(0, Config(64, least, 64, 1, 3, 4))[0], {}
    for outputs, inputs, stages in itertools.product((64, 128), (64, 128, 256), (3, 4, 6)):
        if 40 * 1024 <= (outputs + least) * inputs * 2 * stages <= 220 * 1024:
            config = Config(outputs, least, inputs, 1, stages, 4)
            if torch.equal(draw(0, config)[0], wanted):
                calls[config] = lambda i, config=config: draw(i, config)
    times = microseconds([*calls.values(), lambda i: F.linear(x, weights[i])], len(weights), 9)
    found = sorted(zip(times, [*map(str, calls), "product"], strict=True))[:8]
    print(f"batch {batch}", *(f"\n  {us:8.2f} us  {config}" for us, config in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/sampling.json"))
    parser.add_argument("--tune", action="store_true", help="time the kernel's configurations instead")
    args = parser.parse_args()
    weights = [torch.randn(VOCABULARY, K, device="cuda", dtype=torch.bfloat16) / 64 for _ in range(2)]
    if args.tune:
        for batch in (1, 4, 16, 64):
            tune(batch, weights)
        return
    ids, p = {"all": parity(), f"{KEPT} kept": parity(10, KEPT)}, chi_square()
    tied = {"random logits": ties(False), "equal logits": ties(True)}
    print(ids, "chi-square p", p, tied, flush=True)
    rows = []
    for batch in (1, 4, 16, 64):
        rows.append(found := row(batch, weights))
        gain = found["us"]["compiled"] / found["us"]["taut"]
        print(f"batch {batch:3} {found['us']}  gain {gain:.2f}  slack {found['slack']}", flush=True)
    head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "ids": ids, "chi_square_p": p}
    head |= {"ties": tied}
    args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
