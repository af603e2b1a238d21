"""Runs in a process of its own with Triton's interpreter switched on: every kernel, by one configuration a path.

Prints a line `name error plain_error` a case. Inputs are float16 and outputs float32: the interpreter multiplies no
bfloat16, and truncates where it stores it. Outputs are NaN before.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from taut.nn import sampling
from taut.ops._activation import ACTIVATIONS
from taut.ops._triton.launch import (
    Attention,
    Config,
    decode_attention,
    glu_rows,
    norm_rows,
    project,
    row_squares,
    sample_lm_head,
)
from taut.ops.decode_attention import decode_attention as attention
from taut.ops.linear import linear
from taut.ops.norm_glu import norm_glu
from taut.ops.norm_linear import norm_linear
from taut.ops.rms_norm import rms_norm

MATVEC, SPLIT = Config(4, 0, 64), Config(16, 16, 32, 2)
WHOLE, WIDE = Config(32, 16, 32), Config(64, 64, 64)
PRODUCTS = [(1, 77, 30, MATVEC), (1, 128, 33, Config(8, 0, 128)), (3, 72, 50, WHOLE), (5, 77, 50, SPLIT)]
PRODUCTS += [(20, 128, 70, WIDE), (2, 200, 17, Config(16, 16, 64, 3)), (70, 64, 40, WIDE)]


def make(*size: int) -> Tensor:
    return torch.randn(*size).half()


def with_gaps(t: Tensor) -> Tensor:
    """The same values in rows that stand apart, with NaN between."""
    room = torch.full((len(t), t.shape[1] + 8), float("nan"), dtype=t.dtype)
    room[:, : t.shape[1]] = t
    return room[:, : t.shape[1]]


def widened(args: tuple) -> tuple:
    return tuple(a.double() if isinstance(a, Tensor) and a.is_floating_point() else a for a in args)


def report(name: str, y: Tensor, truth: Tensor, plain: Tensor) -> None:
    error = lambda t: float((t.double() - truth).norm() / truth.norm())  # noqa: E731
    print(name, error(y), error(plain), flush=True)


def poisoned(*size: int) -> Tensor:
    return torch.full(size, float("nan"))


def products() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    for tokens, k, n, config in PRODUCTS:
        x, weight, up = (with_gaps(make(*size)) for size in ((tokens, k), (n, k), (n, k)))
        gain, bias, residual = make(k) if tokens == 1 else None, make(n), make(tokens, n)
        name = f"{tokens}x{k}x{n}"
        y = project(x, weight, poisoned(tokens, n), config, gain=gain, bias=bias, residual=residual, eps=1e-2)
        args = (x, weight, gain, bias, 1e-2, residual)
        yield f"norm_linear {name}", y, norm_linear.reference(*widened(args)), norm_linear.reference(*args)
        y = project(x, weight, poisoned(tokens, n), config, bias=bias)
        yield f"linear {name}", y, linear.reference(*widened((x, weight, bias))), linear.reference(x, weight, bias)
        for act in ACTIVATIONS if config == MATVEC else ("gelu",):
            y = project(x, weight, poisoned(tokens, n), config, up=up, act=act, gain=gain, eps=1e-5)
            args = (x, weight, up, gain, 1e-5, act)
            yield f"norm_glu {act} {name}", y, norm_glu.reference(*widened(args)), norm_glu.reference(*args)


def rows() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    y = make(3, 300)
    yield "row_squares", row_squares(y), y.double().square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    x, gain = with_gaps(make(301, 77)), make(77)
    truth, plain = rms_norm.reference(*widened((x, gain, 1e-2))), rms_norm.reference(x, gain, 1e-2)
    yield "norm_rows", norm_rows(x, gain, poisoned(301, 77), 1e-2), truth, plain
    x, gate, up = make(3, 40), make(30, 40), make(30, 40)
    g, u = x @ gate.T, x @ up.T
    truth = norm_glu.reference(*widened((x, gate, up)))
    yield "glu_rows", glu_rows(x, g, u, poisoned(3, 30), 1e-6, "silu"), truth, norm_glu.reference(x, gate, up)


def decoding() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    cases = attention.cases
    assert cases is not None
    for number, (args, kwargs) in enumerate(cases(make)):
        q, k, v, lengths, *table = args
        for batch, length in enumerate(lengths.tolist() if not table else ()):
            v[batch, :, length:] = float("nan")
        clean = (q, k, v.nan_to_num(), lengths, *table)
        truth, plain = attention.reference(*widened(clean), **kwargs), attention.reference(*clean, **kwargs)
        for processors in (1, 5, 40):
            places = q, k, v, lengths, *(table or [None]), poisoned(*q.shape)
            y = decode_attention(*places, kwargs.get("scale"), Attention(16), processors)
            yield f"decode_attention {number} on {processors}", y, truth, plain


def draws() -> Iterator[tuple[str, Tensor, Tensor, Tensor]]:
    h, weight, heat = make(5, 64), make(1003, 64) * 0.2, torch.tensor([0, 1.0, 0.5, 2, 1])
    mask = torch.rand(5, 1003) > 0.3
    for seed, step in ((0, 0), (2**40 + 12345, 7), (2**63 - 5, 2**31 - 3)):
        for allowed in (None, mask):
            expected = sampling.sample_lm_head(h, weight, heat, allowed, seed, step=step)
            key = torch.tensor([seed, step])
            ids, log_z = sample_lm_head(h, weight, heat, key, allowed, None, Config(128, 16, 32, 1, 2))
            assert torch.equal(ids, expected.ids), (seed, step, ids, expected.ids)
            yield f"sample {seed}", log_z, expected.log_z.double(), expected.log_z
    scale = (h.double().square().mean(-1) + 1e-2).sqrt()
    expected = sampling.sample_lm_head(h, weight, heat * scale, seed=3)
    ids, _ = sample_lm_head(h, weight, heat, torch.tensor([3, 0]), None, 1e-2, Config(128, 16, 32, 1, 2))
    assert torch.equal(ids, expected.ids)


if __name__ == "__main__":
    torch.manual_seed(0)
    for part in (products, rows, decoding, draws):
        for case in part():
            report(*case)
