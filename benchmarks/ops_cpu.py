"""taut's CPU ops against torch's in one run: interleaved, parity first, inputs rotated through memory.

    python benchmarks/ops_cpu.py [--only WORD] [--rounds 40] [--mib 1024] [--quantile 0.5] [--json FILE]

Slack is measured time over the least time at the read bandwidth found in the same run; below 1 a cache served it.
`of a read` is measured time over that of a plain read of the same inputs in the same rounds. Every time is the same
quantile of its rounds: the median, or a lower one where other processes hold the cores.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from itertools import permutations

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from taut.catalogue import find
from taut.machine import cpu_name, read_bandwidth, read_size
from taut.op import Op, nbytes
from taut.ops._cpu import kernel, threads
from taut.ops._weights import dequantize, quantize

OPS = find("taut.ops", Op)
FP32, BF16 = torch.float32, torch.bfloat16
FREED = 31 * 2**20
"""Bytes of a block whose return makes glibc keep what smaller ones return. Else a result of either side is on pages
new to the process at every call, or never, by how blocks of earlier cases lie."""


@dataclass(frozen=True)
class Case:
    """An op on fresh inputs from `make`, and the torch code that does the same."""

    op: str
    label: str
    make: Callable[[], tuple[tuple, dict]]
    torch: Callable[..., Tensor | tuple[Tensor, Tensor]]
    dtype: torch.dtype


@dataclass(frozen=True)
class Row:
    op: str
    case: str
    torch_us: float
    taut_us: float
    ratio: float
    gb_per_s: float
    slack: float
    over_read: float


def norms() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for rows in (1, 4, 16, 64, 512):
            for d in (576, 2048, 4096, 8192):
                label = f"({rows}, {d}) {short(dtype)}"
                x = lambda rows=rows, d=d, dtype=dtype: torch.randn(rows, d).to(dtype)  # noqa: E731
                w = lambda d=d, dtype=dtype: torch.rand(d).add(0.5).to(dtype)  # noqa: E731
                yield Case("rms_norm", label, lambda x=x, w=w: ((x(), w()), {}), torch_rms_norm, dtype)
                yield Case("layer_norm", label, lambda x=x, w=w: ((x(), w(), w()), {}), torch_layer_norm, dtype)
                yield Case("add_rms_norm", label, lambda x=x, w=w: ((x(), x(), w()), {}), torch_add_rms_norm, dtype)


def products() -> Iterator[Case]:
    for n, k in ((576, 1536), (8192, 4096)):
        for tokens in (1, 4, 16):
            for stored in ("float32", "bfloat16", "float16", "int8", "int4"):
                dtype = getattr(torch, stored) if "float" in stored else FP32

                def make(n=n, k=k, tokens=tokens, stored=stored, dtype=dtype) -> tuple[tuple, dict]:
                    weight, scale = torch.randn(n, k), None
                    if "int" in stored:
                        weight, scale = quantize(weight, int(stored[3:]))
                    return (torch.randn(tokens, k).to(dtype), weight.to(dtype) if scale is None else weight), {
                        "scale": scale
                    }

                yield Case("linear", f"({n}, {k}) {stored}, {tokens} tokens", make, torch_linear, dtype)


def caches() -> Iterator[Case]:
    for dtype in (FP32, BF16):
        for batch, heads, kv_heads, d, keys in ((1, 9, 3, 64, 512), (1, 9, 3, 64, 4096), (1, 32, 8, 128, 4096)):

            def make(b=batch, h=heads, hk=kv_heads, d=d, keys=keys, dtype=dtype) -> tuple[tuple, dict]:
                return tuple(torch.randn(b, *shape, d).to(dtype) for shape in ((h, 1), (hk, keys), (hk, keys))), {}

            yield Case(
                "attention", f"{heads}/{kv_heads} x {d}, {keys} keys {short(dtype)}", make, torch_attention, dtype
            )


def torch_rms_norm(x: Tensor, gain: Tensor) -> Tensor:
    return F.rms_norm(x, gain.shape, gain, 1e-6)


def torch_layer_norm(x: Tensor, gain: Tensor, bias: Tensor) -> Tensor:
    return F.layer_norm(x, gain.shape, gain, bias, 1e-5)


def torch_add_rms_norm(x: Tensor, residual: Tensor, gain: Tensor) -> tuple[Tensor, Tensor]:
    total = x + residual
    return torch_rms_norm(total, gain), total


def torch_linear(x: Tensor, weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """The fastest that torch has for the format; for int4, the product with weights unpacked beforehand would cheat."""
    return F.linear(x, weight if scale is None else dequantize(weight, scale, x.dtype))


def torch_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True)


def short(dtype: torch.dtype) -> str:
    return {FP32: "fp32", BF16: "bf16", torch.float16: "fp16"}[dtype]


def error(y, truth: Tensor) -> float:
    y = y[0] if isinstance(y, tuple) else y
    return float((y.double() - truth).norm() / truth.norm())


def check(case: Case, args: tuple, kwargs: dict) -> None:
    """The error against float64 is at most twice that of torch's code, plus one ulp."""
    widen = lambda t: t.double() if isinstance(t, Tensor) and t.is_floating_point() else t  # noqa: E731
    truth = OPS[case.op].reference(*map(widen, args), **{k: widen(v) for k, v in kwargs.items()})
    truth = truth[0] if isinstance(truth, tuple) else truth
    fast, plain = error(OPS[case.op](*args, **kwargs), truth), error(case.torch(*args, **kwargs), truth)
    assert fast <= 2 * plain + torch.finfo(case.dtype).eps, f"{case.op} {case.label}: error {fast:.2e} over {plain:.2e}"


def read_all(*args: object, **kwargs: object) -> None:
    """Read the same inputs and do nothing else."""
    for t in (*args, *kwargs.values()):
        if isinstance(t, Tensor):
            kernel("read", "read")(t.data_ptr(), nbytes(t) // 4, threads(nbytes(t)))


def measure(case: Case, rounds: int, rotate: int, bandwidth: float, quantile: float) -> Row:
    args, kwargs = case.make()
    check(case, args, kwargs)
    size = nbytes(*(t for t in (*args, *kwargs.values()) if isinstance(t, Tensor)))
    inputs = [case.make() for _ in range(max(2, min(rounds, rotate // size)))]
    times: dict[str, list[float]] = {"torch": [], "taut": [], "read": []}
    runs = {"torch": case.torch, "taut": OPS[case.op], "read": read_all}
    orders = list(permutations(runs))  # what ran before leaves the caches its way: to each the same turns after each
    for i in range(rounds):
        for name in orders[i % len(orders)]:
            args, kwargs = inputs[(i + list(runs).index(name) * len(inputs) // 3) % len(inputs)]
            start = time.perf_counter()
            runs[name](*args, **kwargs)
            times[name].append(time.perf_counter() - start)
    theirs, ours, read = (float(np.quantile(times[name], quantile)) for name in runs)
    work = OPS[case.op].work
    assert work is not None
    least = work(*args, **kwargs).bytes
    rate, slack = least / ours / 1e9, ours * bandwidth / least
    return Row(case.op, case.label, theirs * 1e6, ours * 1e6, theirs / ours, rate, slack, ours / read)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="", help="only cases whose op or label holds this")
    parser.add_argument("--rounds", type=int, default=40)
    parser.add_argument("--mib", type=int, default=1024, help="memory that the inputs rotate through")
    parser.add_argument("--quantile", type=float, default=0.5)
    parser.add_argument("--json", help="also write the rows here")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    torch.empty(FREED, dtype=torch.uint8)
    bandwidth = read_bandwidth(read_size(), seconds=0.5)
    print(f"{cpu_name()}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"read bandwidth {bandwidth.value / 1e9:.1f} GB/s ({bandwidth.source})")
    rows = []
    for case in (*products(), *caches(), *norms()):
        if options.only in f"{case.op} {case.label}":
            row = measure(case, options.rounds, options.mib * 2**20, bandwidth.value, options.quantile)
            rows.append(row)
            print(f"{row.op:13} {row.case:32} torch {row.torch_us:9.1f} us  taut {row.taut_us:9.1f} us  ", end="")
            print(
                f"x{row.ratio:<6.2f} {row.gb_per_s:6.1f} GB/s  slack {row.slack:.2f}, x{row.over_read:.2f} of a read",
                flush=True,
            )
    for op in dict.fromkeys(row.op for row in rows):
        ratios = [row.ratio for row in rows if row.op == op]
        print(f"{op}: median x{statistics.median(ratios):.2f}, least x{min(ratios):.2f}")
    if options.json:
        with open(options.json, "w") as file:
            run = {"cpu": cpu_name(), "quantile": options.quantile, "bandwidth": asdict(bandwidth)}
            json.dump(run | {"rows": [asdict(row) for row in rows]}, file, indent=1)


if __name__ == "__main__":
    main()
