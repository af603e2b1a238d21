"""What a preset maximum saves in decode attention: one split-KV kernel with it and with the running maximum, on a GPU.

    python benchmarks/async_softmax.py [--out benchmarks/results/h200/async_softmax.json]

Source: Hong et al., FlashDecoding++, 2023, arXiv:2311.01282, section 3. With `phi` no partial sum waits for another: no
rescaling, and sums over the keys are taken once, at the end. The least and greatest scores are kept, so that whoever
leaves the window can be computed again. Both forms have the same tiles; each takes its best of a few configurations.
"""

from __future__ import annotations

import argparse
import itertools
import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from taut.ops._triton.start import interpreted
from taut.ops._triton.timing import copies_for, microseconds

ROWS, LOG2_E = 16, 1.4426950408889634


@triton.jit
def part(q, k, v, sums_to, stats, n, length, scale, phi, GROUP: tl.constexpr, D: tl.constexpr, KEYS: tl.constexpr,
         ROWS: tl.constexpr, ONLINE: tl.constexpr):  # fmt: skip
    """One key head's `length` keys from program_id(1) on: the weighted sum, the weight, and the extreme scores."""
    head, split = tl.program_id(0).to(tl.int64), tl.program_id(1)
    row, feature, key = tl.arange(0, ROWS), tl.arange(0, D), tl.arange(0, KEYS)
    query = tl.load(q + (head * GROUP + row)[:, None] * D + feature[None, :], mask=(row < GROUP)[:, None], other=0)
    greatest, weight = tl.full([ROWS], float("-inf"), tl.float32), tl.zeros([ROWS], tl.float32)
    weights, high = tl.zeros([ROWS, KEYS], tl.float32), tl.full([ROWS, KEYS], float("-inf"), tl.float32)
    low, sums = tl.full([ROWS, KEYS], float("inf"), tl.float32), tl.zeros([ROWS, D], tl.float32)
    for start in range(split * length, tl.minimum(n, (split + 1) * length), KEYS):
        at = (head * n + start + key).to(tl.int64)[:, None] * D + feature[None, :]
        scores = tl.dot(query, tl.load(k + at).T) * scale
        values = tl.load(v + at)
        if ONLINE:
            higher = tl.maximum(greatest, tl.max(scores, 1))
            shrink = tl.exp2(greatest - higher)
            p = tl.exp2(scores - higher[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            sums *= shrink[:, None]
            greatest = higher
        else:
            high, low = tl.maximum(high, scores), tl.minimum(low, scores)
            p = tl.exp2(scores - phi)
            weights += p
        sums = tl.dot(p.to(values.dtype), values, sums)
    place = (head * tl.num_programs(1) + split) * ROWS + row
    tl.store(sums_to + place[:, None] * D + feature[None, :], sums)
    tl.store(stats + place * 3, weight if ONLINE else tl.sum(weights, 1))
    tl.store(stats + place * 3 + 1, greatest if ONLINE else tl.max(high, 1))
    tl.store(stats + place * 3 + 2, greatest if ONLINE else tl.min(low, 1))


@triton.jit
def merge(sums_of, stats, y, left, phi, window, SPLITS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
          ROWS: tl.constexpr, ONLINE: tl.constexpr):  # fmt: skip
    """One query: its parts together, and whether its scores left [phi - window, phi]."""
    head, row = tl.program_id(0).to(tl.int64), tl.program_id(1)
    split, feature = tl.arange(0, SPLITS), tl.arange(0, D)
    place = (head * SPLITS + split) * ROWS + row
    weight, high = tl.load(stats + place * 3), tl.load(stats + place * 3 + 1)
    sums = tl.load(sums_of + place[:, None] * D + feature[None, :])
    if ONLINE:
        factor = tl.exp2(high - tl.max(high, 0))
        weight *= factor
        sums *= factor[:, None]
    else:
        low = tl.min(tl.load(stats + place * 3 + 2), 0)
        inside = (tl.max(high, 0) <= phi) & (low >= phi - window)
        tl.store(left + head * GROUP + row, 1 - inside.to(tl.int32))
    out = tl.sum(sums, 0) / tl.sum(weight, 0)
    tl.store(y + (head * GROUP + row) * D + feature, out.to(y.dtype.element_ty))


def decode(q: Tensor, k: Tensor, v: Tensor, splits: int, keys: int, warps: int, stages: int, phi: float | None = None,
           window: float = 80.0) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Attention of q [batch, heads, d] over k, v [batch, key heads, n, d], and which queries left the window. Sizes are
    powers of two and keys * splits divides n. `phi` and `window` are in units of the natural exponent."""
    (batch, heads, d), kv_heads, n = q.shape, k.shape[1], k.shape[2]
    group, programs = heads // kv_heads, batch * kv_heads
    sums = torch.empty(programs, splits, ROWS, d, dtype=torch.float32, device=q.device)
    stats = torch.empty(programs, splits, ROWS, 3, dtype=torch.float32, device=q.device)
    y, left = torch.empty_like(q), torch.zeros(batch, heads, dtype=torch.int32, device=q.device)
    online, top = phi is None, (phi or 0.0) * LOG2_E
    scale = d**-0.5 * LOG2_E
    part[(programs, splits)](
        q,
        k,
        v,
        sums,
        stats,
        n,
        n // splits,
        scale,
        top,
        group,
        d,
        keys,
        ROWS,
        online,
        num_warps=warps,
        num_stages=stages,
    )
    merge[(programs, group)](sums, stats, y, left, top, window * LOG2_E, splits, group, d, ROWS, online)
    return y, left


def check(device: str, dtype: torch.dtype) -> None:
    """Both forms against float64, at most twice as far off as torch's attention; a large score is noticed."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(*s, device=device).to(dtype) for s in ((2, 8, 64), (2, 2, 256, 64), (2, 2, 256, 64)))
    attend = lambda *t: F.scaled_dot_product_attention(t[0][:, :, None], *t[1:], enable_gqa=True)[:, :, 0]  # noqa: E731
    truth = attend(q.double(), k.double(), v.double())
    error = lambda y: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
    for phi in (None, 8.0):
        y, left = decode(q, k, v, 4, 32, 4, 2, phi)
        assert error(y) <= 2 * error(attend(q, k, v)) + torch.finfo(dtype).eps, (phi, error(y))
        assert not left.any()
    q[1, 3] *= 100
    assert decode(q, k, v, 4, 32, 4, 2, 8.0)[1].nonzero().tolist() == [[1, 3]]


CONFIGS = [(64, 4, 3), (64, 4, 4), (128, 4, 3), (128, 8, 3), (128, 8, 2)]


def row(batch: int, keys: int, heads: int = 32, kv_heads: int = 8, d: int = 128) -> dict:
    copies = copies_for(4 * batch * kv_heads * keys * d, least=2, most=16)
    shapes = (batch, heads, d), (batch, kv_heads, keys, d), (batch, kv_heads, keys, d)
    inputs = [[torch.randn(*s, device="cuda").bfloat16() for s in shapes] for _ in range(copies)]
    splits = max(1, min(keys // 256, triton.next_power_of_2(264 // (batch * kv_heads))))
    best = {}
    for config in CONFIGS:
        calls = [lambda i, c=config, p=phi: decode(*inputs[i], splits, *c, p) for phi in (None, 8.0)]
        times = microseconds(calls, copies, 11)
        for name, us in zip(("running maximum", "preset maximum"), times, strict=True):
            best[name] = min(best.get(name, us), us)
    gain = best["running maximum"] / best["preset maximum"]
    read = 4 * batch * kv_heads * keys * d / best["preset maximum"] / 1e6
    return {"batch": batch, "keys": keys, "us": best, "gain": round(gain, 3), "tb_per_s": round(read, 2)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/async_softmax.json"))
    arguments = parser.parse_args()
    if interpreted():
        sys.exit(check("cpu", torch.float16))
    check("cuda", torch.bfloat16)
    rows = []
    for batch, keys in itertools.product((1, 4, 16), (4096, 8192, 32768)):
        rows.append(found := row(batch, keys))
        print(found, flush=True)
        head = {"device": torch.cuda.get_device_name(), "heads": "32 over 8, 128 features, bfloat16"}
        arguments.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")


if __name__ == "__main__":
    main()
