"""Runs in a process of its own with Triton's interpreter switched on: every kernel, by one configuration a path. With
the name of a device as its argument it runs there, compiled.

Prints a line `name error plain_error` a case. Inputs are float16 and outputs float32: the interpreter multiplies no
bfloat16, and truncates where it stores it. Outputs are NaN before.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator

import torch
from torch import Tensor

from taut.nn import sampling
from taut.ops._activation import ACTIVATIONS
from taut.ops._triton import grads
from taut.ops._triton.centred import project as layer_norm_project
from taut.ops._triton.heads import rope_append
from taut.ops._triton.launch import Attention, Config, argmax_lm_head, decode_attention, project, sample_lm_head
from taut.ops._triton.read import read
from taut.ops._triton.rows import add_norm_rows, add_rows, argmax_rows, glu_rows, norm_rows, row_squares
from taut.ops.add_rms_norm import add_rms_norm
from taut.ops.decode_attention import decode_attention as attention
from taut.ops.glu_grad import glu_grad
from taut.ops.layer_norm_linear import layer_norm_linear
from taut.ops.linear import linear
from taut.ops.norm_glu import norm_glu
from taut.ops.norm_linear import norm_linear
from taut.ops.rms_norm import rms_norm
from taut.ops.rms_norm_grad import rms_norm_grad
from taut.ops.rope import rope

Case = tuple[str, Tensor, Tensor, Tensor]
"""(name, result, truth, plain result)."""
MATVEC, SPLIT = Config(4, 0, 64), Config(16, 16, 32, 2, 3)
WHOLE, WIDE = Config(32, 16, 32, 1, 3), Config(64, 64, 64, 1, 3)
PRODUCTS = [(1, 77, 30, MATVEC), (1, 128, 33, Config(8, 0, 128)), (3, 72, 50, WHOLE), (5, 77, 50, SPLIT)]
PRODUCTS += [(20, 128, 70, WIDE), (2, 200, 17, Config(16, 16, 64, 3, 3)), (70, 64, 40, WIDE)]


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


def products() -> Iterator[Case]:
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


def summed() -> Iterator[Case]:
    """The same behind a sum, which is written too, and with a gain that more than one token shares."""
    for tokens, k, n, config in PRODUCTS[1:5]:
        x, delta, gain, weight = with_gaps(make(tokens, k)), with_gaps(make(tokens, k)), make(k), make(n, k)
        stream = torch.full((tokens, k), float("nan")).half()
        y = project(x, weight, poisoned(tokens, n), config, gain=gain, eps=1e-2, delta=delta, stream=stream)
        assert torch.equal(stream, x + delta)
        args = (stream, weight, gain, None, 1e-2)
        yield f"summed {tokens}x{k}x{n}", y, norm_linear.reference(*widened(args)), norm_linear.reference(*args)


def centred() -> Iterator[Case]:
    """Behind a LayerNorm, of inputs around zero and of some whose mean is a hundred deviations."""
    for (tokens, k, n, config), mean in itertools.product(PRODUCTS, (0, 100)):
        x, weight = with_gaps(make(tokens, k) + mean), with_gaps(make(n, k))
        bias, residual = make(n), make(tokens, n)
        args = x, weight, bias, 1e-2, residual
        truth, plain = layer_norm_linear.reference(*widened(args)), layer_norm_linear(*args, impl="torch")
        for sums in (None, weight.float().sum(1)):
            y = poisoned(tokens, n)
            layer_norm_project(x, weight, y, config, sums=sums, bias=bias, residual=residual, eps=1e-2)
            yield f"layer_norm_linear {tokens}x{k}x{n} {mean}", y, truth, plain


def rows() -> Iterator[Case]:
    y = make(3, 300)
    yield "row_squares", row_squares(y), y.double().square().sum(-1, keepdim=True), y.square().sum(-1, keepdim=True)
    x, delta, gain = with_gaps(make(301, 77)), with_gaps(make(301, 77)), make(77)
    truth, plain = rms_norm.reference(*widened((x, gain, 1e-2))), rms_norm.reference(x, gain, 1e-2)
    yield "norm_rows", norm_rows(x, gain, poisoned(301, 77), 1e-2), truth, plain
    total, y = torch.full((301, 77), float("nan")).half(), poisoned(301, 77)
    add_norm_rows(x, delta, gain, total, y, 1e-2)
    plain, expected = add_rms_norm.reference(x, delta, gain, 1e-2)
    assert torch.equal(total, expected)
    yield "add_norm_rows", y, rms_norm.reference(*widened((expected, gain, 1e-2))), plain
    squares = add_rows(x, delta, total.fill_(float("nan")))
    assert torch.equal(total, expected)
    yield "add_rows", squares, expected.double().square().sum(-1, keepdim=True), expected.square().sum(-1, keepdim=True)
    x, gate, up = make(3, 40), make(30, 40), make(30, 40)
    both = torch.cat((x @ gate.T, x @ up.T), 1)
    truth, plain = norm_glu.reference(*widened((x, gate, up))), norm_glu.reference(x, gate, up)
    for squares in (None, row_squares(x)):
        y = glu_rows(x, both[:, :30], both[:, 30:], poisoned(3, 30), 1e-6, "silu", squares)
        yield "glu_rows", y, truth, plain
    for columns in (77, 20_000):
        x = torch.randint(0, columns // 2, (5, columns)).half()
        assert torch.equal(argmax_rows(x), x.argmax(-1))


def turning() -> Iterator[Case]:
    """7 tokens of three sequences, 3 query heads on 1 and 12 on 4, caches with room and with pages."""
    positions, sequences = torch.tensor([0, 1, 2, 8, 4, 5, 3]), torch.tensor([0, 0, 0, 1, 1, 1, 2])
    table = torch.tensor([[4, 0, 2], [1, 3, 7], [5, 6, 8]])
    for heads, kv, d, rotary, interleaved, pages in ((3, 1, 16, 16, False, False), (12, 4, 24, 8, True, True)):
        stream, weight = make(7, 40), make((heads + 2 * kv) * d, 40)
        angles = torch.randn(9, rotary // 2)
        angles = angles.repeat_interleave(2, -1) if interleaved else torch.cat((angles, angles), -1)
        room = (9, kv, 4, d) if pages else (3, kv, 11, d)
        q, keys, values = poisoned(7, heads, d), poisoned(*room), poisoned(*room)
        places = with_gaps(stream @ weight.T), angles.cos(), angles.sin(), positions, q, keys, values
        how = {"sequences": sequences, "table": table if pages else None, "interleaved": interleaved}
        rope_append(*places, squares=row_squares(stream), width=40, eps=1e-2, **how)
        if pages:
            keys, values = (t[table].transpose(1, 2).flatten(2, 3) for t in (keys, values))
        assert keys.isfinite().sum() == values.isfinite().sum() == 7 * kv * d
        found = torch.cat((q, keys[sequences, :, positions], values[sequences, :, positions]), 1)
        turned = lambda t: _turned(t, weight, angles[positions], d, heads + kv, interleaved)  # noqa: B023, E731
        truth, plain = turned(stream.double()), turned(stream)
        yield f"rope_append {pages}", found, truth, plain


def _turned(stream: Tensor, weight: Tensor, angles: Tensor, d: int, turning: int, interleaved: bool) -> Tensor:
    projected = norm_linear.reference(stream, weight.to(stream.dtype), eps=1e-2).unflatten(1, (-1, d))
    cos, sin = (f(angles.to(stream.dtype))[:, None] for f in (torch.cos, torch.sin))
    return torch.cat((rope.reference(projected[:, :turning], cos, sin, interleaved), projected[:, turning:]), 1)


def slopes() -> Iterator[Case]:
    for tokens, k, config in ((1, 77, None), (40, 130, None), (70, 33, grads.Slopes(1, 3, 2)), (9, 9000, None)):
        args = with_gaps(make(tokens, k)), with_gaps(make(tokens, k)), make(k)
        found = grads.rms_norm_grad(*args, poisoned(tokens, k), 1e-2, 3, config)
        truth, plain = rms_norm_grad.reference(*widened(args), 1e-2), rms_norm_grad.reference(*args, 1e-2)
        for i, name in enumerate(("dx", "dgain")):
            yield f"norm_slopes {name}", found[i], truth[i], plain[i]
    args = make(3, 700), make(3, 700), make(3, 700)
    for act in ACTIVATIONS:
        found = grads.glu_grad(*args, poisoned(3, 700), poisoned(3, 700), act)
        truth, plain = glu_grad.reference(*widened(args), act), glu_grad.reference(*args, act)
        for i, name in enumerate(("dgate", "dup")):
            yield f"glu_slopes {act} {name}", found[i], truth[i], plain[i]


def decoding() -> Iterator[Case]:
    cases = attention.cases
    assert cases is not None
    for number, (args, kwargs) in enumerate(cases(make)):
        q, k, v, lengths, *table = args
        for batch, length in enumerate(lengths.tolist() if not table else ()):
            v[batch, :, length:] = float("nan")
        clean = (q, k, v.nan_to_num(), lengths, *table)
        truth, plain = attention.reference(*widened(clean), **kwargs), attention.reference(*clean, **kwargs)
        for processors, whole in ((1, True), (5, False), (40, True), (43, False), (43, True)):
            pages, y = table[0] if table else None, poisoned(*q.shape)
            config = Attention(16, whole=whole)
            decode_attention(q, k, v, lengths, pages, y, kwargs.get("scale"), config, processors)
            yield f"decode_attention {number} on {processors}, whole {whole}", y, truth, plain


def draws() -> Iterator[Case]:
    """The ids are compared here; what is reported is the logarithm of the sum of exp of the logits."""
    h, weight, heat = make(5, 64), make(1003, 64) * 0.2, torch.tensor([0, 1.0, 0.5, 2, 1])
    mask, config = torch.rand(5, 1003) > 0.3, Config(128, 16, 32, 1, 2)
    for seed, step in ((0, 0), (2**40 + 12345, 7), (2**63 - 5, 2**31 - 3)):
        for allowed in (None, mask):
            expected = sampling.sample_lm_head(h, weight, heat, allowed, seed, step=step)
            ids, log_z = sample_lm_head(h, weight, heat, torch.tensor([seed, step]), allowed, None, config)
            assert torch.equal(ids, expected.ids), (seed, step, ids, expected.ids)
            yield f"sample {seed}", log_z, *_log_z(h, weight, heat, allowed)
    expected = sampling.sample_lm_head(h, weight, heat, seed=3, eps=1e-2)
    ids, _ = sample_lm_head(h, weight, heat, torch.tensor([3, 0]), None, 1e-2, config)
    assert torch.equal(ids, expected.ids)
    assert torch.equal(argmax_lm_head(h, weight, config), (h.double() @ weight.double().T).argmax(-1))


def _log_z(
    h: Tensor, weight: Tensor, heat: Tensor, allowed: Tensor | None, k: int | None = None
) -> tuple[Tensor, Tensor]:
    """In float64 and in float32."""
    found = []
    for dtype in (torch.float64, torch.float32):
        logits = h.to(dtype) @ weight.to(dtype).T / torch.where(heat > 0, heat, 1)[:, None]
        logits = logits if allowed is None else logits.masked_fill(~allowed, float("-inf"))
        found.append((logits if k is None else logits.topk(k).values).logsumexp(-1))
    return found[0], found[1]


def kept() -> Iterator[Case]:
    """Few and many of the greatest logits; then equal ones in several tiles, of which the lowest ids are kept."""
    h, weight, heat, config = (
        make(5, 32),
        make(201, 32) * 0.2,
        torch.tensor([0, 1.0, 0.5, 2, 1]),
        Config(32, 16, 32, 1, 2),
    )
    mask, key = torch.rand(5, 201) > 0.3, torch.tensor([2**40 + 1, 7])
    for k, eps in ((1, None), (5, None), (50, 1e-2)):
        expected = sampling.sample_lm_head(h, weight, heat, mask, 2**40 + 1, k, step=7, eps=eps)
        ids, log_z = sample_lm_head(h, weight, heat, key, mask, eps, config, k)
        assert torch.equal(ids, expected.ids), (k, ids, expected.ids)
        if eps is None:
            yield f"kept {k}", log_z, *_log_z(h, weight, heat, mask, k)
    h, weight, ones = torch.ones(2, 16).half(), torch.ones(100, 16).half(), torch.ones(2)
    weight[[3, 40, 41, 90]] = 2
    config = Config(32, 16, 16, 1, 2)
    for k in (2, 7):
        expected = sampling.sample_lm_head(h, weight, ones, seed=5, k=k, step=6)
        ids, log_z = sample_lm_head(h, weight, ones, torch.tensor([5, 6]), None, None, config, k)
        assert torch.equal(ids, expected.ids)
        yield f"kept {k} of equals", log_z, *_log_z(h, weight, ones, None, k)
    assert argmax_lm_head(h, weight, config).tolist() == [3, 3]


def reading() -> Iterator[Case]:
    """Every number is read once."""
    values = torch.rand(100_003, dtype=torch.float32)
    yield "read", read(values, torch.empty(7)).sum(), values.double().sum(), values.sum()


if __name__ == "__main__":
    torch.set_default_device(sys.argv[1] if len(sys.argv) > 1 else "cpu")
    torch.manual_seed(0)
    for part in (products, summed, centred, rows, turning, slopes, decoding, draws, kept, reading):
        for case in part():
            report(*case)
