"""Decode attention on a GPU: taut's equal shares against cuDNN, torch's flash and a fixed split, in one run.

    python benchmarks/decode_attention.py [--out benchmarks/results/h200/decode_attention.json] [--tune]

32 query and 8 key heads of 128 features, bf16. Parity and twenty equal runs first; then CUDA graphs, replayed in turn.
The fixed split's time is a lower bound: its longest request alone, on the programs that it gets. With --tune the
kernel's configurations are timed instead, beside cuDNN, and printed from the fastest on.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from taut.ops._triton.launch import Attention
from taut.ops._triton.launch import decode_attention as run
from taut.ops._triton.timing import copies_for, microseconds
from taut.ops.decode_attention import decode_attention

HEADS, KV, D = 32, 8, 128
CASES = {
    "4096": [4096],
    "32768": [32768],
    "131072": [131072],
    "16 of 4096": [4096] * 16,
    "131072 and 15 of 2048": [131072] + [2048] * 15,
}
BYTES_PER_S = 4.8e12
TRIED = [
    *(Attention(64, 1, stages, 4, whole) for stages in (3, 4, 5) for whole in (False, True)),
    *(Attention(64, 2, stages, 4) for stages in (2, 3)),
    *(Attention(128, 1, 3, 4), Attention(128, 1, 3, 8), Attention(64, 1, 4, 8), Attention(64, 2, 3, 2)),
]


def caches(lengths: list[int], copies: int) -> tuple[list[Tensor], list[Tensor]]:
    size = len(lengths), KV, max(lengths), D
    make = lambda: [torch.randn(size, device="cuda", dtype=torch.bfloat16) for _ in range(copies)]  # noqa: E731
    return make(), make()


def parity(q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, config: Attention | None = None) -> tuple[float, float]:
    """taut's error and that of plain code in bf16 against float64, of the first head; all runs have the same bits."""
    again = lambda: run(q, k, v, lengths, None, torch.empty_like(q), config=config)  # noqa: E731
    y = again()
    assert all(torch.equal(y, again()) for _ in range(20))
    group = HEADS // KV
    part = q[:, :group], k[:, :1], v[:, :1]
    truth = decode_attention.reference(*(t.double() for t in part), lengths)
    scores = (part[0].unflatten(1, (1, group)) @ part[1].mT * D**-0.5).float()
    unseen = torch.arange(k.shape[2], device="cuda") >= lengths[:, None]
    plain = (scores.masked_fill(unseen[:, None, None], float("-inf")).softmax(-1).bfloat16() @ part[2]).flatten(1, 2)
    error = lambda t: float((t.double() - truth).norm() / truth.norm())  # noqa: E731
    assert error(y[:, :group]) <= 2 * error(plain)
    return error(y[:, :group]), error(plain)


def peers(q: Tensor, ks: list[Tensor], vs: list[Tensor]) -> Iterator[tuple[str, object]]:
    for name, backend in (("cudnn", SDPBackend.CUDNN_ATTENTION), ("flash", SDPBackend.FLASH_ATTENTION)):

        def call(i: int, backend=backend) -> Tensor:
            with sdpa_kernel(backend):
                return F.scaled_dot_product_attention(q[:, :, None], ks[i], vs[i], enable_gqa=True)

        yield name, call


def fixed(q: Tensor, ks: list[Tensor], vs: list[Tensor], longest: Tensor, y: Tensor, parts: int):
    """The longest request alone, each of its heads split among so many programs."""
    return lambda i: run(q[:1], ks[i][:1], vs[i][:1], longest, None, y, processors=KV * parts)


def row(name: str, lengths: list[int]) -> dict:
    torch.manual_seed(0)
    nbytes = sum(lengths) * KV * D * 4
    copies = copies_for(nbytes, least=4, most=16)
    q = torch.randn(len(lengths), HEADS, D, device="cuda", dtype=torch.bfloat16)
    ks, vs = caches(lengths, copies)
    on_device = torch.tensor(lengths, device="cuda", dtype=torch.int32)
    errors = parity(q, ks[0], vs[0], on_device)
    calls = {"taut": lambda i: decode_attention(q, ks[i], vs[i], on_device, impl="triton")}
    if len(set(lengths)) == 1:
        calls |= dict(peers(q, ks, vs))
    else:
        y = torch.empty_like(q[:1])
        calls |= {f"fixed split in {n}": fixed(q, ks, vs, on_device[:1], y, n) for n in (1, 2, 4, 8, 16)}
    times = dict(zip(calls, microseconds(list(calls.values()), copies, 20), strict=True))
    us = {way: round(time, 2) for way, time in times.items()}
    slack = round(times["taut"] / (nbytes / BYTES_PER_S * 1e6), 2)
    return {"case": name, "lengths": lengths, "us": us, "slack": slack, "error": errors[0], "plain_error": errors[1]}


def tune(name: str, lengths: list[int]) -> None:
    """Print every configuration and cuDNN by their microseconds, the fastest first; a wrong one ends the run."""
    torch.manual_seed(0)
    nbytes = sum(lengths) * KV * D * 4
    copies = copies_for(nbytes, least=4, most=16)
    q = torch.randn(len(lengths), HEADS, D, device="cuda", dtype=torch.bfloat16)
    ks, vs = caches(lengths, copies)
    on_device, y = torch.tensor(lengths, device="cuda", dtype=torch.int32), torch.empty_like(q)
    for config in TRIED:
        parity(q, ks[0], vs[0], on_device, config)
    calls: dict = {c: lambda i, c=c: run(q, ks[i], vs[i], on_device, None, y, config=c) for c in TRIED}
    calls |= {way: call for way, call in peers(q, ks, vs) if len(set(lengths)) == 1 and way == "cudnn"}
    times = microseconds(list(calls.values()), copies, 20)
    found = sorted(zip(times, calls, strict=True), key=lambda pair: pair[0])
    print(name, *(f"\n  {us:8.2f} us  {way if isinstance(way, str) else tuple(way)}" for us, way in found), flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/decode_attention.json"))
    parser.add_argument("--tune", action="store_true", help="time the kernel's configurations instead")
    args = parser.parse_args()
    if args.tune:
        for name, lengths in CASES.items():
            tune(name, lengths)
        return
    rows = []
    for name, lengths in CASES.items():
        rows.append(found := row(name, lengths))
        print(f"{name:24} {found['us']}  slack {found['slack']}", flush=True)
        head = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.out.write_text(json.dumps({**head, "rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
