"""What published claims about norms come to on a GPU, each against an honest and against its own kind of baseline.

    python benchmarks/norm_claims.py [--out benchmarks/results/h200/norm_claims.json]

- MXNorm and 8-bit rows: norm and quantizer as one kernel against a compiled norm and a compiled quantizer, and against
  both compiled together; for 8-bit rows also with the product behind them.
- LayerNorm against RMSNorm, both compiled.
- RMSNorm forward and backward against Liger's kernels, where these are installed; backward also with other numbers of
  programs a multiprocessor and of rows on their way than the kernel takes by itself.
- LayerNorm and the linear layer behind it, both deferred, against both compiled, with gain and bias and without.
- RMSNorm and the linear layer behind it, at the widths of the published check.
- FlashNorm's own protocol (norm, then project, float16): an unfused norm as in its notebook, a compiled one, and its
  deferred form on two streams, called one by one and as CUDA graphs.

Everything but the last "called one by one" is a CUDA graph of calls on inputs of their own, replayed in turn.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import torch
import torch.nn.functional as F
from kernels_table import best_peer
from norm_project import liger
from norm_project import row as project_row
from torch import Tensor

from taut import machine
from taut.formats.microscaling import in_blocks
from taut.nn.norm.mx import gaussian_constant
from taut.ops._triton import grads
from taut.ops._triton.timing import copies_for, microseconds
from taut.ops._triton.tune import Shape
from taut.ops.layer_norm_linear import layer_norm_linear
from taut.ops.mx_norm import mx_norm
from taut.ops.norm_fp8 import norm_fp8
from taut.ops.rms_norm import rms_norm
from taut.ops.rms_norm_grad import rms_norm_grad

EPS, LARGEST = 1e-6, 448.0
C = gaussian_constant(2, 32)


def timed(ways: dict[str, Callable[[Tensor], object]], tokens: int, d: int, dtype=torch.bfloat16) -> dict[str, float]:
    copies = copies_for(4 * tokens * d, least=4, most=64)
    xs = [torch.randn(tokens, d, device="cuda").to(dtype) for _ in range(copies)]
    calls = [lambda i, way=way: way(xs[i]) for way in ways.values()]
    return {name: round(us, 2) for name, us in zip(ways, microseconds(calls, copies, 15), strict=True)}


def compiled(way: Callable) -> Callable:
    return torch.compile(way, dynamic=False)


def rms(x: Tensor) -> Tensor:
    return F.rms_norm(x, x.shape[-1:], eps=EPS)


def mx_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """MXFP8 in as few operations as torch has for it."""
    blocks = in_blocks(x.float(), 32)
    top = blocks.abs().amax(-1, keepdim=True)
    exponent = (((top.view(torch.int32) >> 23) & 255) - 127 - 8).clamp(-126, 127)
    scale = ((127 - exponent) << 23).view(torch.float32)
    codes = (blocks * scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn)
    return (exponent + 127).to(torch.uint8).squeeze(-1), codes.flatten(-2)


def fp8_quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    scale = x.float().abs().amax(-1, keepdim=True).clamp_min(1e-30) / LARGEST
    return (x.float() / scale).clamp(-LARGEST, LARGEST).to(torch.float8_e4m3fn), scale


def mx_rows() -> list[dict]:
    rows = []
    for d in (4096, 8192):
        for tokens in (256, 1024, 4096, 16384):
            torch._dynamo.reset()
            norm, quantize, both = compiled(rms), compiled(mx_quantize), compiled(lambda x: mx_quantize(rms(x)))
            ways = {
                "one kernel": lambda x: mx_norm(x, C, EPS, impl="triton"),
                "one kernel, exact": lambda x: mx_norm(x, C, EPS, True, impl="triton"),
                "norm, then quantizer": lambda x, q=quantize, n=norm: q(n(x)),
                "compiled together": both,
            }
            x = torch.randn(64, d, device="cuda").bfloat16()
            scales, codes = mx_norm(x, C, EPS, True, impl="triton")
            wanted = mx_norm.reference(x, C, EPS, True)
            differ = (codes != wanted[1]).float().mean().item() + (scales != wanted[0]).float().mean().item()
            assert differ < 1e-3, differ
            us = timed(ways, tokens, d)
            gain = round(us["norm, then quantizer"] / us["one kernel"], 2)
            rows.append({"tokens": tokens, "d": d, "us": us, "gain": gain})
            print("mx", rows[-1], flush=True)
    return rows


def fp8_rows() -> list[dict]:
    rows = []
    for k, n, counts in ((4096, 6144, (1024, 4096, 16384)), (8192, 10240, (4096,))):
        weight = fp8_quantize(torch.randn(n, k, device="cuda"))
        for tokens in counts:
            torch._dynamo.reset()
            norm, quantize = compiled(rms), compiled(fp8_quantize)
            product = lambda a, s, w=weight: torch._scaled_mm(  # noqa: E731
                a, w[0].T, s, w[1].T, out_dtype=torch.bfloat16
            )

            def absorbed(x: Tensor) -> tuple[Tensor, Tensor]:
                codes, scale = norm_fp8(x, EPS, impl="triton")
                return codes.view(torch.float8_e4m3fn), scale[:, None]

            apart = lambda x, q=quantize, n=norm: q(n(x))  # noqa: E731
            fixed = fp8_quantize(torch.randn(tokens, k, device="cuda"))
            ways = {
                "one kernel": absorbed,
                "norm, then quantizer": apart,
                "one kernel, product": lambda x, p=product: p(*absorbed(x)),
                "norm, then quantizer, product": lambda x, p=product, a=apart: p(*a(x)),
                "product": lambda x, p=product, q=fixed: p(*q),
            }
            x = torch.randn(tokens, k, device="cuda").bfloat16()
            values, wanted = (q.float() * s for q, s in (absorbed(x), fp8_quantize(rms(x.float()))))
            off = ((values - wanted).norm() / wanted.norm()).item()
            us = timed(ways, tokens, k)
            gains = [us["norm, then quantizer" + end] / us["one kernel" + end] for end in ("", ", product")]
            rows.append({"tokens": tokens, "k": k, "n": n, "us": us, "off": off, "gains": [round(g, 3) for g in gains]})
            print("fp8", rows[-1], flush=True)
    return rows


def layer_rows() -> list[dict]:
    rows = []
    for d in (2048, 8192):
        for tokens in (16, 1024, 16384):
            torch._dynamo.reset()
            gain, bias = torch.rand(d, device="cuda").bfloat16(), torch.rand(d, device="cuda").bfloat16()
            ways = {
                "LayerNorm": compiled(lambda x, g=gain, b=bias: F.layer_norm(x, g.shape, g, b, EPS)),
                "RMSNorm": compiled(lambda x, g=gain: F.rms_norm(x, g.shape, g, EPS)),
            }
            us = timed(ways, tokens, d)
            rows.append({"tokens": tokens, "d": d, "us": us, "gain": round(us["LayerNorm"] / us["RMSNorm"], 3)})
            print("layer", rows[-1], flush=True)
    return rows


def rms_row(tokens: int, d: int, peer: ModuleType | None) -> dict:
    """Microseconds, and terabytes a second of what must be read and written once."""
    copies, gain = copies_for(6 * tokens * d, least=3, most=24), torch.rand(d, device="cuda").bfloat16() + 0.5
    xs, ds = ([torch.randn(tokens, d, device="cuda").bfloat16() for _ in range(copies)] for _ in range(2))
    forward: dict[str, Callable[[int], object]] = {"taut": lambda i: rms_norm(xs[i], gain, EPS, impl="triton")}
    backward: dict[str, Callable[[int], object]] = {
        "taut": lambda i: rms_norm_grad(ds[i], xs[i], gain, EPS, impl="triton")
    }
    processors, chosen = torch.cuda.get_device_properties(0).multi_processor_count, grads.fitting(d)
    for programs, stages, warps in itertools.product((1, 2, 4), (1, 2, 3), (chosen.warps, 2 * chosen.warps)):
        config = grads.Slopes(programs, stages, warps)
        if config != chosen:
            name = f"taut, {programs} programs, {stages} stages, {warps} warps"
            backward[name] = lambda i, config=config: grads.rms_norm_grad(
                ds[i], xs[i], gain, torch.empty_like(xs[i]), EPS, processors, config
            )
    if peer is not None:
        saved = [peer.rms_norm_forward(x, gain, EPS, 0.0, "llama", None) for x in xs]
        block, warps, mode = saved[0][3:]
        forward["Liger"] = lambda i: peer.rms_norm_forward(xs[i], gain, EPS, 0.0, "llama", None)
        backward["Liger"] = lambda i: peer.rms_norm_backward(
            ds[i], xs[i], gain, saved[i][2], 0.0, mode, block, warps, True, None
        )
    found = {}
    for name, ways, moved in (("forward", forward, 4), ("backward", backward, 6)):
        us = dict(zip(ways, microseconds(list(ways.values()), copies, 11), strict=True))
        found[name] = {way: [round(t, 2), round(moved * tokens * d / t / 1e6, 2)] for way, t in us.items()}
    return {"tokens": tokens, "d": d, "us and TB/s": found}


def rms_rows() -> list[dict]:
    """RMSNorm with its gain, forward and backward; Liger's backward writes over its input, as it does by default."""
    rows, peer = [], liger()
    for d, tokens in itertools.product((2048, 8192), (1024, 16384)):
        rows.append(rms_row(tokens, d, peer))
        print("rms", rows[-1], flush=True)
    return rows


def layer_norm_linear_row(k: int, n: int, tokens: int) -> dict:
    """Each call on a weight of its own from memory. Parity first: at most twice the error of plain code."""
    torch._dynamo.reset()
    copies = copies_for(2 * n * k, least=4, most=64)
    gain, shift, bias = (torch.rand(size, device="cuda").bfloat16() for size in (k, k, n))
    x = torch.randn(tokens, k, device="cuda").bfloat16()
    weights = [(torch.randn(n, k, device="cuda") / k**0.5).bfloat16() for _ in range(copies)]
    sums = [w.sum(1, dtype=torch.float32) for w in weights]
    whole = compiled(lambda x, w: F.linear(F.layer_norm(x, x.shape[-1:], gain, shift), w, bias))
    folded = compiled(lambda x, w: F.linear(F.layer_norm(x, x.shape[-1:]), w, bias))
    truth = layer_norm_linear.reference(x.double(), weights[0].double(), bias.double())
    y = layer_norm_linear(x, weights[0], bias, sums=sums[0], impl="triton")
    errors = [((t.double() - truth).norm() / truth.norm()).item() for t in (y, folded(x, weights[0]))]
    assert errors[0] <= 2 * errors[1], errors
    ways = {
        "taut": lambda i: layer_norm_linear(x, weights[i], bias, sums=sums[i], impl="triton"),
        "compiled": lambda i: whole(x, weights[i]),
        "compiled, folded": lambda i: folded(x, weights[i]),
        "product": lambda i: F.linear(x, weights[i], bias),
    }
    us = dict(zip(ways, (round(t, 2) for t in microseconds(list(ways.values()), copies, 15)), strict=True))
    gain_over = round(min(us["compiled"], us["compiled, folded"]) / us["taut"], 3)
    return {"k": k, "n": n, "tokens": tokens, "us": us, "errors": errors, "gain": gain_over}


def layer_norm_linear_rows() -> list[dict]:
    rows = []
    for (k, n), tokens in itertools.product(((768, 2304), (768, 3072), (2560, 7680), (4096, 16384)), (1, 16, 64)):
        rows.append(layer_norm_linear_row(k, n, tokens))
        print("layer_norm_linear", rows[-1], flush=True)
    return rows


def project_rows() -> list[dict]:
    """The check: never slower than the best peer, 1.15 times as fast at up to 64 tokens on the first two."""
    rows, device = [], machine.load("h200-sxm")
    for shape in (Shape(576, 960), Shape(2048, 3072), Shape(4096, 6144), Shape(8192, 10240)):
        for tokens in (1, 16, 64, 256, 1024, 4096):
            found = project_row(shape, tokens, device)
            rows.append(found | {"gain": round(best_peer(found["us"]) / found["us"]["taut"], 3)})
            print("norm_project", rows[-1], flush=True)
    return rows


def one_by_one(calls: list[Callable], repeats: int = 60) -> list[float]:
    """Microseconds of a call, each between two events, the median."""
    found: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, seen in zip(calls, found, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            call()
            end.record()
            end.synchronize()
            seen.append(1e3 * start.elapsed_time(end))
    return [statistics.median(seen[10:]) for seen in found]


def flash_rows() -> list[dict]:
    rows = []
    for n, k, counts in ((576, 960, (1, 4096, 8192)), (4096, 4096, (1, 1024, 4096))):
        weight, gain = torch.randn(k, n, device="cuda").half() / n**0.5, torch.ones(n, device="cuda").half()
        for tokens in counts:
            torch._dynamo.reset()
            side = torch.cuda.Stream()

            def unfused(x: Tensor, w: Tensor = weight, g: Tensor = gain) -> Tensor:
                inverse = torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS).half()
                return F.linear(x * inverse * g, w)

            fused = compiled(lambda x, w=weight, g=gain: F.linear(F.rms_norm(x, g.shape, g, EPS), w))
            inverse = compiled(lambda x: torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + EPS))
            scaled = compiled(lambda y, s: (y * s).half())

            def deferred(x: Tensor, w: Tensor = weight, side=side, inverse=inverse, scaled=scaled) -> Tensor:
                side.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(side):
                    s = inverse(x)
                y = F.linear(x, w)
                torch.cuda.current_stream().wait_stream(side)
                return scaled(y, s)

            ways = {"unfused": unfused, "compiled": fused, "deferred, two streams": deferred}
            x = torch.randn(tokens, n, device="cuda").half()
            calls = [lambda way=way, x=x: way(x) for way in ways.values()]
            for call in calls:
                call()
            alone = dict(zip(ways, one_by_one(calls), strict=True))
            us = timed(ways, tokens, n, torch.float16)
            percent = {
                f"{kind}, over {base}": round(100 * (1 - times["deferred, two streams"] / times[base]), 1)
                for kind, times in (("one by one", alone), ("graphs", us))
                for base in ("unfused", "compiled")
            }
            alone = {name: round(t, 2) for name, t in alone.items()}
            rows.append({"tokens": tokens, "n": n, "k": k, "one by one": alone, "graphs": us, "saved, %": percent})
            print("flash", rows[-1], flush=True)
    return rows


PARTS = {
    "rms_norm": rms_rows,
    "mx_norm": mx_rows,
    "norm_fp8": fp8_rows,
    "layer_norm": layer_rows,
    "layer_norm_linear": layer_norm_linear_rows,
    "norm_project": project_rows,
    "flash_norm": flash_rows,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/h200/norm_claims.json"))
    parser.add_argument("--parts", nargs="*", default=list(PARTS), choices=PARTS)
    arguments = parser.parse_args()
    record = json.loads(arguments.out.read_text()) if arguments.out.exists() else {}
    record |= {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    for name, part in ((name, PARTS[name]) for name in arguments.parts):
        try:
            record[name] = part()
        except Exception as error:
            record[name] = f"{type(error).__name__}: {error}"
            print(name, record[name], flush=True)
        arguments.out.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
