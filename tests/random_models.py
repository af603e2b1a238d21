"""Random small transformers as plain modules, for hypothesis: what a model is drawn from, and the model.

A `Spec` says everything and prints as the counterexample; parameters are made when they are first used, so that an
operation may need any shape. Norms, linear layers and embeddings are ordinary `nn` modules.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

VOCAB, HEADS = 13, 2


@dataclass(frozen=True)
class Chain:
    """Operations in a row, each with a number that says how; `start` is what it reads, `end` what becomes of it.

    At the end it is put into the stream as it is (raw), through a linear layer (linear, or biased), through a norm and
    such a layer (norm), in the stream's place (instead), or it is an output.
    """

    start: str
    ops: tuple[tuple[str, int], ...]
    end: str


@dataclass(frozen=True)
class Block:
    placement: str
    norm: str
    mixer: str
    mlp: str
    chains: tuple[Chain, ...] = ()
    kv_heads: int = HEADS
    rope: str = ""
    qk_norm: str = ""
    fused: bool = False
    window: bool = False
    spelled: bool = False
    softcap: bool = False
    biases: int = 0
    norm_of: int | None = None
    weights_of: int | None = None
    times: int = 1
    multiplier: float = 1.0


@dataclass(frozen=True)
class Spec:
    blocks: tuple[Block, ...]
    final_norm: str = "rms"
    tied: bool = False
    positions: str = ""
    returns: tuple[str, ...] = ()
    padding: bool = False
    width: int = 8
    length: int = 6
    batch: int = 2
    eps: float = 1e-5
    head_bias: bool = False


class Model(nn.Module):
    """The transformer that a Spec describes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.weights, self.parts = nn.ParameterDict(), nn.ModuleDict()
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self(**example(spec))
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor, picks: Tensor, memory: Tensor) -> dict[str, Tensor]:
        return Pass(self, mask, picks, memory).run(ids)


class Pass:
    """One forward pass, with what its operations read besides their argument."""

    def __init__(self, model: Model, mask: Tensor, picks: Tensor, memory: Tensor) -> None:
        self.model, self.spec, self.mask, self.picks, self.memory = model, model.spec, mask, picks, memory
        self.outputs: dict[str, Tensor] = {}

    def weight(self, key: str, *size: int, mean: float = 0.0) -> Tensor:
        key = "_".join([key, *map(str, size)])
        if key not in self.model.weights:
            noise = torch.randn(size, generator=self.model.generator)
            scale = 0.4 if len(size) < 2 else 1.0 / size[-1] ** 0.5
            self.model.weights[key] = nn.Parameter(mean + scale * noise)
        return self.model.weights[key]

    def part(self, key: str, size: int, make: Callable[[], nn.Module]) -> nn.Module:
        """Blocks that share their weights share what is of the same size."""
        key = f"{key}_{size}".replace(".", "_")
        if key not in self.model.parts:
            part = make().eval()
            with torch.no_grad():
                for parameter in part.parameters():
                    noise = torch.randn(parameter.shape, generator=self.model.generator)
                    vector = parameter.ndim < 2
                    parameter.copy_(parameter + 0.4 * noise if vector else noise / parameter.shape[-1] ** 0.5)
                for buffer in (b for b in part.buffers() if b.is_floating_point()):
                    buffer.add_(0.4 * torch.rand(buffer.shape, generator=self.model.generator))
            self.model.parts[key] = part
        return self.model.parts[key]

    def linear(self, key: str, x: Tensor, out: int, bias: bool = False) -> Tensor:
        return self.part(f"{key}_{out}", x.shape[-1], lambda: nn.Linear(x.shape[-1], out, bias=bias))(x)

    def norm(self, key: str, kind: str, x: Tensor) -> Tensor:
        return self.part(f"{key}_{kind}", x.shape[-1], lambda: NORMS[kind](x.shape[-1], self.spec.eps))(x)

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        spec = self.spec
        table = self.weight("table", VOCAB, spec.width)
        x = F.embedding(ids, table)
        if spec.positions == "learned":
            x = x + self.weight("positions", 2 * spec.length, spec.width)[: spec.length]
        elif spec.positions == "fixed":
            x = x + torch.linspace(-1, 1, spec.length)[:, None] * torch.linspace(0, 1, spec.width)
        for i, block in enumerate(spec.blocks):
            for again in range(block.times):
                x = self.block(f"b{i}", i, block, x, again)
        if "stream" in spec.returns:
            self.outputs["stream"] = x
        y = self.norm("final", spec.final_norm, x) if spec.final_norm else x
        if "hidden" in spec.returns:
            self.outputs["hidden"] = y
        if "pooled" in spec.returns:
            self.outputs["pooled"] = torch.tanh(self.linear("pooler", y[:, 0], spec.width, bias=True))
        head = table if spec.tied else self.weight("head", VOCAB, spec.width)
        bias = self.weight("head_bias", VOCAB) if spec.head_bias else None
        return {"logits": F.linear(y, head, bias), **self.outputs}

    def block(self, key: str, number: int, block: Block, x: Tensor, again: int) -> Tensor:
        norm_key = f"b{block.norm_of % (number + 1)}" if block.norm_of is not None else key
        layer = f"b{block.weights_of % (number + 1)}" if block.weights_of is not None else key
        scale = block.multiplier

        def norm(which: str, value: Tensor) -> Tensor:
            return self.norm(f"{norm_key}_{which}", block.norm, value)

        def mix(y: Tensor) -> Tensor:
            return MIXERS[block.mixer](self, f"{layer}_{block.mixer}_{block.kv_heads}", block, y)

        def mlp(y: Tensor) -> Tensor:
            return MLPS[block.mlp](self, f"{layer}_{block.mlp}", block, y)

        if block.placement == "pre":
            y = norm("one", x)
            mixed = mix(y)
            x = x + scale * mixed
            z = norm("two", x)
            x = x + mlp(z)
        elif block.placement == "post":
            mixed = mix(x)
            y = norm("one", x + mixed)
            z = norm("two", y + scale * mlp(y))
            x = z
        elif block.placement == "sandwich":
            y = norm("one", x)
            mixed = mix(y)
            x = x + norm("after", mixed)
            z = norm("two", x)
            x = x + norm("last", scale * mlp(z))
        elif block.placement == "parallel":
            y = z = norm("one", x)
            mixed = mix(y)
            x = x + mixed + scale * mlp(y)
        else:
            y = z = mixed = norm("one", x)
        values = {"norm": y, "second": z, "mixed": mixed, "middle": y}
        for j, chain in enumerate(block.chains):
            value = x if chain.start == "stream" else values[chain.start]
            for i, (op, how) in enumerate(chain.ops):
                value = OPS[op](self, f"{layer}_c{j}_{i}{op}", value, how, x)
                values["middle"] = value if i == 0 else values["middle"]
            if chain.end == "output":
                self.outputs[f"out{number}{j}{again}"] = value
                continue
            if chain.end == "norm":
                value = self.norm(f"{norm_key}_c{j}_end", block.norm, value)
            back = self.back(f"{layer}_c{j}_out", chain.end, value, x)
            x = back if chain.end == "instead" and back.shape == x.shape else x + back
        return x

    def back(self, key: str, end: str, value: Tensor, stream: Tensor) -> Tensor:
        """A value in a shape that may be added to the stream, through a linear layer or as raw as can be."""
        fits = value.ndim == 3 and all(v in (1, s) for v, s in zip(value.shape, stream.shape, strict=True))
        if fits and end in ("raw", "instead"):
            return value
        if value.ndim == 3 and value.shape[:2] == stream.shape[:2]:
            return self.linear(key, value, stream.shape[-1], end == "biased")
        if value.ndim >= 2 and value.shape[0] == stream.shape[0]:
            return self.linear(key, value.flatten(1), stream.shape[-1], end == "biased")[:, None]
        return value.mean()


def example(spec: Spec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (spec.batch, spec.length)
    mask = torch.ones(size, dtype=torch.bool)
    if spec.padding:
        mask[-1, -2:] = False
    return {
        "ids": torch.randint(0, VOCAB, size, generator=generator),
        "mask": mask,
        "picks": torch.randint(0, spec.length, size, generator=generator),
        "memory": torch.randn(spec.batch, 3, spec.width, generator=generator),
    }


class Rms(nn.Module):
    """RMSNorm by hand; `spelling` is how."""

    def __init__(self, size: int, eps: float, spelling: str) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.zeros(size) if spelling == "1+w" else torch.ones(size))
        self.eps, self.spelling = eps, spelling

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float() if self.spelling != "own dtype" else x
        if self.spelling == "divides":
            normed = wide / (wide.square().mean(-1, keepdim=True) + self.eps).sqrt()
        elif self.spelling == "product":
            normed = torch.reciprocal(torch.sqrt(self.eps + (wide * wide).mean(dim=-1, keepdim=True))) * wide
        else:
            normed = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        gain = {"1+w": 1.0 + self.gain.float(), "half": 0.5 * self.gain}.get(self.spelling, self.gain)
        return (gain * normed).to(x.dtype)


class Layer(nn.Module):
    """LayerNorm by hand; the variance over the wrong axis, or of another degree of freedom, is no LayerNorm."""

    def __init__(self, size: int, eps: float, spelling: str) -> None:
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.eps, self.spelling = eps, spelling

    def forward(self, x: Tensor) -> Tensor:
        centred = x - x.mean(-1, keepdim=True)
        if self.spelling == "unbiased":
            spread = x.var(-1, keepdim=True) if x.shape[-1] > 1 else torch.ones_like(x)
        elif self.spelling == "over tokens":
            spread = centred.pow(2).mean(0, keepdim=True)
        elif self.spelling == "var":
            spread = x.var(-1, keepdim=True, unbiased=False)
        else:
            spread = centred.pow(2).mean(-1, keepdim=True)
        return centred * torch.rsqrt(spread + self.eps) * self.gain + self.bias


class Dyt(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.alpha = nn.Parameter(torch.full((1,), 0.5))
        self.gain, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(self.alpha * x) * self.gain + self.bias


class Tied(nn.Module):
    """A LayerNorm whose bias is its gain."""

    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.gain, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, x.shape[-1:], self.gain, self.gain, self.eps)


class Odd(nn.Module):
    """Gains that are no affine function of a parameter, or of one parameter."""

    def __init__(self, size: int, eps: float, kind: str) -> None:
        super().__init__()
        self.gain, self.eps, self.kind = nn.Parameter(torch.ones(size)), eps, kind
        self.second = nn.Parameter(torch.ones(size))
        self.register_buffer("mask", torch.ones(size))

    def forward(self, x: Tensor) -> Tensor:
        gain = {
            "rounded": lambda: (4 * self.gain).round() / 4,
            "whole": lambda: self.gain.to(torch.int32).to(x.dtype),
            "clamped": lambda: self.gain.clamp(-0.8, 1.2),
            "flipped": lambda: self.gain.flip(0),
            "two": lambda: self.gain * self.second,
            "buffer": lambda: self.gain + self.mask,
            "input": lambda: self.gain + x[0, 0].mean(),
            "one": lambda: self.gain[:1].expand(x.shape[-1]),
            "row": lambda: self.gain[None, None],
        }[self.kind]()
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + self.eps) * gain


NORMS: dict[str, Callable[[int, float], nn.Module]] = {
    "rms": lambda n, eps: nn.RMSNorm(n, eps=eps),
    "layer": lambda n, eps: nn.LayerNorm(n, eps=eps),
    "layer without bias": lambda n, eps: nn.LayerNorm(n, eps=eps, bias=False),
    "rms without gain": lambda n, eps: nn.RMSNorm(n, eps=eps, elementwise_affine=False),
    "layer without gain": lambda n, eps: nn.LayerNorm(n, eps=eps, elementwise_affine=False),
    "dyt": Dyt,
    "tied": Tied,
    **{f"rms {s}": lambda n, eps, s=s: Rms(n, eps, s) for s in ("1+w", "half", "divides", "product", "own dtype")},
    **{f"layer {s}": lambda n, eps, s=s: Layer(n, eps, s) for s in ("plain", "var", "unbiased", "over tokens")},
    **{
        f"odd {k}": lambda n, eps, k=k: Odd(n, eps, k)
        for k in ("rounded", "whole", "clamped", "flipped", "two", "buffer", "input", "one", "row")
    },
}
USUAL = (
    *("rms", "rms 1+w", "rms divides", "rms product"),
    *("layer", "layer without bias", "layer plain", "layer var", "dyt"),
)


def _rotate(x: Tensor, kind: str) -> Tensor:
    """Rotary positions along the second last axis."""
    size = x.shape[-1] // 4 * 2 if kind == "partial" else x.shape[-1]
    angles = torch.arange(x.shape[-2])[:, None] / 10.0 ** (torch.arange(size // 2) / size)
    part = x[..., :size]
    if kind == "interleaved":
        cos, sin = angles.cos().repeat_interleave(2, -1), angles.sin().repeat_interleave(2, -1)
        turned = torch.stack((-part[..., 1::2], part[..., ::2]), -1).flatten(-2)
    else:
        cos, sin = torch.cat((angles, angles), -1).cos(), torch.cat((angles, angles), -1).sin()
        turned = torch.cat((-part[..., size // 2 :], part[..., : size // 2]), -1)
    part = part * cos.to(x.dtype) + turned * sin.to(x.dtype)
    return torch.cat((part, x[..., size:]), -1) if kind == "partial" else part


def _attention(m: Pass, key: str, b: Block, y: Tensor, memory: Tensor | None = None) -> Tensor:
    size, heads, kv = y.shape[-1] // HEADS, HEADS, b.kv_heads
    biased = bool(b.biases & 1)
    if b.fused and memory is None:
        widths = [heads * size, kv * size, kv * size]
        q, k, v = m.linear(f"{key}_qkv", y, sum(widths), biased).split(widths, -1)
    else:
        source = y if memory is None else memory
        q = m.linear(f"{key}_q", y, heads * size, biased)
        k = m.linear(f"{key}_k", source, kv * size, bool(b.biases & 2))
        v = m.linear(f"{key}_v", source, kv * size, biased)
    q, k, v = (t.unflatten(-1, (-1, size)) for t in (q, k, v))
    if b.qk_norm:
        q, k = m.norm(f"{key}_qn", b.qk_norm, q), m.norm(f"{key}_kn", b.qk_norm, k)
    q, k, v = (t.transpose(1, 2) for t in (q, k, v))
    if b.rope and memory is None:
        q, k = _rotate(q, b.rope), _rotate(k, b.rope)
    k, v = (t.repeat_interleave(heads // kv, 1) for t in (k, v))
    allowed = m.mask[:, None, None] if memory is None else torch.ones((), dtype=torch.bool)
    if b.window:
        near = torch.arange(q.shape[2])[:, None] - torch.arange(k.shape[2])
        allowed = allowed & ((near >= 0) & (near < 3) if memory is None else near < 3)
    if b.spelled or b.softcap:
        scores = q @ k.transpose(-1, -2) * size**-0.5
        scores = 2.0 * torch.tanh(scores / 2.0) if b.softcap else scores
        out = scores.masked_fill(~allowed, torch.finfo(torch.float32).min).softmax(-1) @ v
    else:
        out = F.scaled_dot_product_attention(q, k, v, allowed.expand(q.shape[0], 1, q.shape[2], k.shape[2]))
    return m.linear(f"{key}_o", out.transpose(1, 2).flatten(2), y.shape[-1], bool(b.biases & 4))


def _cross(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
    return _attention(m, key, b, y, m.memory) + 0.0 * y


def _conv(m: Pass, key: str, b: Block, y: Tensor, groups: int = 1) -> Tensor:
    size, bias = y.shape[-1], bool(b.biases & 1)
    layer = m.part(key, size, lambda: nn.Conv1d(size, size, 3, padding=1, groups=groups, bias=bias))
    return m.linear(f"{key}_o", layer(y.mT).mT, size, bool(b.biases & 4))


def _batch_normed(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
    """A convolution between two batch norms, as in a Conformer."""
    size = y.shape[-1]
    before, after = (m.part(f"{key}_{where}", size, lambda: nn.BatchNorm1d(size)) for where in ("before", "after"))
    tokens = 1 + b.biases % 3
    layer = m.part(f"{key}_{tokens}", size, lambda: nn.Conv1d(size, size, tokens, bias=bool(b.biases & 1)))
    pad = F.pad(before(y.mT), (0, tokens - 1))
    return m.linear(f"{key}_o", F.silu(after(layer(pad))).mT, size, bool(b.biases & 4))


def _tokens(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
    mixing = m.weight(f"{key}_t", y.shape[1], y.shape[1])
    return m.linear(f"{key}_o", mixing @ y, y.shape[-1], bool(b.biases & 4))


MIXERS = {
    "attention": _attention,
    "cross": _cross,
    "conv": _conv,
    "depthwise": lambda m, key, b, y: _conv(m, key, b, y, y.shape[-1]),
    "batch norm": _batch_normed,
    "tokens": _tokens,
}

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "relu2": lambda t: F.relu(t).square(),
    "gelu": F.gelu,
    "silu": F.silu,
    "tanh": torch.tanh,
    "none": lambda t: t,
    "ten": lambda t: F.relu(9.0 * t) + F.relu(9.0 * t + -10.0) * -1.0,
}


def _mlp(act: str) -> Callable[[Pass, str, Block, Tensor], Tensor]:
    def run(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
        hidden = ACTIVATIONS[act](m.linear(f"{key}_up", y, 12, bool(b.biases & 8)))
        return m.linear(f"{key}_down", hidden, y.shape[-1], bool(b.biases & 16))

    return run


def _glu(act: str) -> Callable[[Pass, str, Block, Tensor], Tensor]:
    def run(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
        if b.fused:
            gate, up = m.linear(f"{key}_gate_up", y, 24, bool(b.biases & 8)).chunk(2, -1)
        else:
            gate, up = m.linear(f"{key}_gate", y, 12, bool(b.biases & 8)), m.linear(f"{key}_up", y, 12)
        return m.linear(f"{key}_down", ACTIVATIONS[act](gate) * up, y.shape[-1], bool(b.biases & 16))

    return run


def _experts(m: Pass, key: str, b: Block, y: Tensor) -> Tensor:
    """Every expert computed for every token; a router with groups says how much of each."""
    scores = m.linear(f"{key}_router", y, 4, bool(b.biases & 8))
    scores = scores.sigmoid() if b.biases & 16 else scores.softmax(-1)
    groups = scores.unflatten(-1, (2, 2)).sum(-1)
    best = groups.topk(1, -1).indices
    allowed = torch.zeros_like(groups).scatter(-1, best, 1.0).repeat_interleave(2, -1)
    chosen = (scores * allowed).topk(2, -1)
    share = torch.zeros_like(scores).scatter(-1, chosen.indices, chosen.values)
    up, down = m.weight(f"{key}_up", 4, y.shape[-1], 10), m.weight(f"{key}_down", 4, 10, y.shape[-1])
    hidden = F.silu(torch.matmul(y[:, None], up))
    return (torch.matmul(hidden, down) * share.mT[..., None]).sum(1)


MLPS = {name: _mlp(name) for name in ACTIVATIONS} | {f"{name} glu": _glu(name) for name in ACTIVATIONS}
MLPS["experts"] = _experts


Operation = Callable[[Pass, str, Tensor, int, Tensor], Tensor]


def _halves(x: Tensor) -> tuple[Tensor, Tensor]:
    half = max(1, x.shape[-1] // 2)
    return x[..., :half], x[..., -half:]


def _windows(m: Pass, key: str, x: Tensor, how: int, groups: int) -> Tensor:
    if x.ndim != 3:
        return x
    make = lambda: nn.Conv1d(x.shape[-1], x.shape[-1], 1 + how % 3, padding=how // 3 % 2, groups=groups, bias=how > 3)  # noqa: E731
    padded = x if x.shape[1] >= 3 else x.repeat(1, 3, 1)
    return m.part(f"{key}_{how}", x.shape[-1], make)(padded.mT).mT


def _scaled_weight(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    weight = m.weight(key, 6, x.shape[-1])
    bias = m.weight(f"{key}_bias", 6) if how % 2 else None
    turned, rounded = weight.t().contiguous().t(), weight.to(torch.bfloat16).to(x.dtype)
    spelling = (weight * 0.5, weight / 3, weight.clone(), turned, rounded)[how % 5]
    return F.linear(x, spelling, bias if bias is None or how % 3 else bias * 0.5)


def _partial_weight(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    weight, bias, n = m.weight(key, 8, x.shape[-1]), m.weight(f"{key}_bias", 8), x.shape[-1]
    if how == 0:
        return F.linear(x, weight[:4], bias[:4])
    if how == 1:
        return F.linear(x, weight[:4], bias[:4]) * F.linear(x, weight[4:], bias[4:])
    if how == 2:
        return F.linear(x[..., : n // 2], weight[:, : n // 2]) + F.linear(x[..., n // 2 :], weight[:, n // 2 :])
    if how == 3:
        return F.linear(x, weight[:4], bias[4:])
    if how == 4:
        return F.linear(x, weight[::2]) + F.linear(x.abs(), weight[1::2])
    return F.linear(x, weight.flip(1), bias.flip(0))


def _tied_weight(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    n = x.shape[-1]
    weight = m.weight(key, n, n)
    if how == 0:
        return F.linear(F.linear(x, weight), weight.t())
    if how == 1:
        return F.linear(x, weight, weight[0])
    if how == 2:
        return F.linear(x, weight) + weight[0]
    if how == 3:
        return F.linear(x, weight) + weight[:, 0] * x
    if how == 4 and x.shape == stream.shape:
        return F.linear(x, weight) + F.linear(stream, weight)
    return F.linear(x, weight.t(), weight[:, 0])


def _one_bias(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    weight, bias = m.weight(key, x.shape[-1], 6), m.weight(f"{key}_bias", 1 if how % 2 else 6)
    return torch.addmm(bias, x.reshape(-1, x.shape[-1]), weight).view(*x.shape[:-1], 6)


def _inplace(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    x = x.clone()
    if how == 0:
        x[:, 0] = 0.0
    elif how == 1:
        x[..., 0] *= 2.0
    elif how == 2:
        x.mul_(0.5)
    elif how == 3:
        x.relu_()
    elif how == 4:
        x[:, 1:] += x[:, :-1].clone()
    else:
        x[..., : x.shape[-1] // 2] = 1.0
    return x


def _pick(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    if how == 0:
        return x[:, -1]
    if how == 1:
        return x[:, ::2]
    if how == 2 and x.ndim == 3 and x.shape[1] == m.picks.shape[1]:
        return x.gather(1, m.picks[..., None].expand(*m.picks.shape, x.shape[-1]))
    if how == 3 and x.shape[1] >= m.picks.shape[1]:
        return x[:, m.picks[0]]
    if how == 4 and x.ndim == 3 and x.shape[1] == m.picks.shape[1]:
        return x[torch.arange(x.shape[0]), m.picks[:, 0]]
    return x.index_select(-1, torch.arange(x.shape[-1]).flip(0))


def _ranked(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    axis = -1 if how % 2 else min(1, x.ndim - 1)
    if how < 2:
        return x.topk(min(2, x.shape[axis]), axis).values
    if how < 4:
        return x.sort(axis).values
    best = x.argmax(axis)
    return m.weight(key, x.shape[axis], 5)[best]


def _joined(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    rolled = x.roll(1, min(1, x.ndim - 1))
    return [
        lambda: torch.cat([x, x], -1),
        lambda: torch.cat([x, x.flip(-1)], -1),
        lambda: torch.cat([x, rolled], -1),
        lambda: torch.cat([x, x.abs()], -1),
        lambda: torch.stack([x, rolled], -1).flatten(-2),
        lambda: torch.cat([x, stream], -1) if x.shape[:-1] == stream.shape[:-1] else x,
    ][how]()


def _moved(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    return [
        lambda: x.roll(1, 1) if x.ndim > 1 else x,
        lambda: x.roll(1, -1),
        lambda: x.flip(-1),
        lambda: x.transpose(-1, -2) if x.ndim > 1 else x,
        lambda: x.unflatten(-1, (2, -1)) if x.shape[-1] % 2 == 0 and x.ndim < 5 else x,
        lambda: x.flatten(-2) if x.ndim > 2 else x,
        lambda: x.unsqueeze(-1).squeeze(-1),
        lambda: x.unsqueeze(1).expand(x.shape[0], 2, *x.shape[1:]) if x.ndim < 4 else x,
        lambda: x.transpose(0, 1) if x.ndim > 1 else x,
        lambda: x.reshape(x.shape[0], x.shape[1] // 2, 2 * x.shape[2]) if x.ndim == 3 and x.shape[1] % 2 == 0 else x,
        lambda: x[..., : max(1, x.shape[-1] // 2)],
        lambda: x.unfold(1, 2, 1) if x.ndim == 3 and x.shape[1] > 1 else x,
    ][how % 12]()


def _reduced(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    last, tokens = -1, min(1, x.ndim - 1)
    return [
        lambda: x.mean(tokens, keepdim=True),
        lambda: x.mean(last, keepdim=True),
        lambda: x.sum(last, keepdim=True).expand_as(x),
        lambda: x - x.mean(last, keepdim=True),
        lambda: x - x.mean(tokens, keepdim=True),
        lambda: x.amax(last, keepdim=True) * x,
        lambda: x.amax(tokens, keepdim=True),
        lambda: x.cumsum(tokens),
        lambda: x.mean(tokens) if x.ndim > 2 else x,
        lambda: x / (x.square().sum(last, keepdim=True) + 1.0).sqrt(),
        lambda: F.normalize(x, dim=last, eps=1e-3),
        lambda: x.sum((0, last), keepdim=True).expand_as(x),
    ][how % 12]()


def _elementwise(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    return [
        lambda: x.relu(),
        lambda: x.abs(),
        lambda: x.square(),
        lambda: -x,
        lambda: F.gelu(x),
        lambda: x.sigmoid(),
        lambda: 1.7 * x,
        lambda: x + 0.3,
        lambda: x.clamp(-1.0, 1.0),
        lambda: x.clamp_min(0.0),
        lambda: x.pow(3),
        lambda: (x.abs() + 0.1).sqrt(),
        lambda: F.leaky_relu(x, 0.2),
        lambda: F.dropout(x, 0.5, False),
        lambda: (4 * x).to(torch.int32).to(x.dtype),
        lambda: x.to(torch.bfloat16).to(x.dtype),
        lambda: x.softmax(-1),
        lambda: x.softmax(1) if x.ndim > 1 else x,
        lambda: 1.0 / (1.0 + x.abs()),
        lambda: x.bool().to(x.dtype) + x.round(),
        lambda: x.square().sqrt(),
        lambda: x.square().reciprocal().clamp_max(50.0),
    ][how % 22]()


def _paired(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    one, two = _halves(x)
    rolled = x.roll(1, min(1, x.ndim - 1))
    return [
        lambda: x + rolled,
        lambda: x * rolled,
        lambda: F.silu(one) * two,
        lambda: one.relu() * two,
        lambda: one * two,
        lambda: one / (1.0 + two.abs()),
        lambda: torch.maximum(one, two),
        lambda: x * x,
        lambda: x + x,
        lambda: x @ x.mT if x.ndim > 2 else x,
        lambda: (x[:, :, None] * x[:, None]).sum(2) if x.ndim == 3 else x,
        lambda: x * stream if x.shape == stream.shape else x,
        lambda: x + stream if x.shape == stream.shape else x,
        lambda: x.softmax(-1) * x,
        lambda: x * x.mean(-1, keepdim=True),
        lambda: one * two.sigmoid(),
        lambda: x.softmax(-1) @ x.mT.softmax(-1).mT if x.ndim == 3 and x.shape[1] == x.shape[2] else x,
        lambda: x / x.abs().amax(-1, keepdim=True).clamp_min(0.1),
    ][how % 18]()


def _masked(m: Pass, key: str, x: Tensor, how: int, stream: Tensor) -> Tensor:
    if x.shape[:2] != m.mask.shape:
        return x
    mask = m.mask.view(*m.mask.shape, *[1] * (x.ndim - 2))
    return [
        lambda: x.masked_fill(~mask, 0.0),
        lambda: x.masked_fill(~mask, 1.0),
        lambda: x * mask,
        lambda: torch.where(mask, x, 0.0),
        lambda: torch.where(mask, x, -x),
        lambda: torch.where(x > 0, x, 0.1 * x),
    ][how]()


def _parametric(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    n = x.shape[-1]
    return [
        lambda: x + m.weight(key, n),
        lambda: x * m.weight(key, n),
        lambda: x * m.weight(key, 1),
        lambda: x @ m.weight(key, n),
        lambda: (x @ m.weight(key, n))[..., None],
        lambda: m.weight(key, x.shape[-2], x.shape[-2]) @ x if x.ndim > 1 else x,
        lambda: m.weight(key, x.shape[-2]) @ x if x.ndim > 2 else x,
        lambda: torch.matmul(x, m.weight(key, x.shape[0], n, 5)) if x.ndim == 3 else x,
        lambda: torch.bmm(x, m.weight(key, x.shape[0], n, 5)) if x.ndim == 3 else x,
        lambda: x @ m.weight(key, n, 5),
        lambda: torch.einsum("...i,oi->...o", x, m.weight(key, 5, n)),
        lambda: F.prelu(x, m.weight(key, 1)),
    ][how % 12]()


def _attend(m: Pass, key: str, x: Tensor, how: int, _: Tensor) -> Tensor:
    if x.ndim != 3:
        return x
    if how % 2:
        return F.scaled_dot_product_attention(x[:, None], x[:, None], x[:, None])[:, 0]
    return (x @ x.mT).softmax(-1) @ x


OPS: dict[str, Operation] = {
    "linear": lambda m, key, x, how, s: m.linear(key, x, (8, 6, 1)[how % 3], bias=how > 2),
    "norm": lambda m, key, x, how, s: m.norm(key, (*USUAL, "rms without gain")[how % 10], x),
    "batch norm": lambda m, key, x, how, s: (
        m.part(key, x.shape[1], lambda: nn.BatchNorm1d(x.shape[1], eps=1e-3, affine=how % 2 == 0))(x)
        if x.ndim == 3
        else x
    ),
    "conv": lambda m, key, x, how, s: _windows(m, key, x, how, 1),
    "depthwise": lambda m, key, x, how, s: _windows(m, key, x, how, x.shape[-1]),
    "scaled weight": _scaled_weight,
    "partial weight": _partial_weight,
    "tied weight": _tied_weight,
    "one bias": _one_bias,
    "inplace": _inplace,
    "pick": _pick,
    "rank": _ranked,
    "join": _joined,
    "move": _moved,
    "reduce": _reduced,
    "elementwise": _elementwise,
    "pair": _paired,
    "mask": _masked,
    "parametric": _parametric,
    "attend": _attend,
    "rope": lambda m, key, x, how, s: (
        _rotate(x, ("half", "interleaved", "partial")[how % 3]) if x.ndim > 1 and x.shape[-1] % 4 == 0 else x
    ),
}
MANY = ("move", "reduce", "elementwise", "pair", "parametric", "norm")
"""Operations with more than six ways."""

NAMES = 4 * [*(name for name in OPS if name != "inplace"), "linear", "linear", "norm", "move"] + ["inplace"]
"""Writes in place make a trace take three times as long."""


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=0, max_size=5))
    ops = tuple((name, draw(st.integers(0, 23 if name in MANY else 5))) for name in names)
    start = draw(st.sampled_from(["norm", "norm", "second", "mixed", "stream"]))
    return Chain(start, ops, draw(st.sampled_from(["linear", "linear", "raw", "output"])))


NORM_NAMES = st.sampled_from([*USUAL, *USUAL, *NORMS])


def _ways(**ways: str) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), int(how)) for name, given in ways.items() for how in given.split()]


NEAR = {
    "gain": _ways(
        rope="0 1 2 0 1 2",
        move="0 1 2 3 4 5 7 8 9 10 11",
        reduce="0 1 2 3 5 6 9 10",
        pair="0 2 4 5 8 9 10 11 14 16",
        elementwise="3 4 6 7 13 14 15",
        join="0 1 2 3 4 5",
        mask="0 1 2 3 4",
        parametric="0 1 2 3 5 6 7 8 9 10",
        conv="0 1 2 3 4 5 4 5",
        depthwise="0 3 4 5",
        tied_weight="0 1 2 3 4 5 1 2 3",
        partial_weight="0 1 2 3 4 5",
        scaled_weight="0 1 2 3 4 5",
        one_bias="0 1",
        rank="1 3",
        pick="0 1 2 3 4 5",
    ),
    "mean": _ways(
        move="0 1 3 4 7 10 10 10 11",
        reduce="0 1 3 4 5",
        elementwise="0 0 4 4 7",
        pair="3 8 9 10 14",
        mask="1 4 5",
        parametric="0 1 1 1 2 5 11",
        join="0 1 2 3 4",
        pick="0 5",
        linear="0 3",
        conv="0 4",
        batch_norm="0 1",
        attend="0 1",
        rope="0",
    ),
    "scale": _ways(
        linear="0 3",
        move="0 1 3 4 5 7 8 9 10 11",
        elementwise="0 1 2 3 4 4 5 6 7 8 9 10 11 12 15 16 17 18 20 21",
        reduce="0 1 2 3 4 5 6 7 8 9 11",
        pair="0 1 2 3 4 5 6 7 8 9 10 13 14 15 17",
        join="1 2 3 4 5",
        mask="1 2 3 4 5",
        parametric="0 1 2 3 4 5 6 7 8 9 10 11",
        rope="0 1",
        pick="0 1 2 3 4 5",
        rank="0 1 2 3 4 5",
        conv="0 1 4",
        attend="0 1",
    ),
}
"""Operations through which a norm's gain, a stream's mean or a norm's scalar comes, or might seem to."""
PASS = {
    "gain": _ways(move="2 4 5 6", mask="2", elementwise="6"),
    "mean": _ways(move="2 6", mask="0", elementwise="3 6"),
    "scale": _ways(linear="0 1", move="0 2 3 4 5", elementwise="0 3", pair="0 1", reduce="0 3", join="0 2 2"),
}
"""Operations that mostly let it through."""


@st.composite
def pointed(draw: st.DrawFn, fact: str) -> Chain:
    """An operation near a fact, and few others: from a norm, from a stream, or from a layer behind a norm."""
    some = lambda: draw(st.lists(st.sampled_from(PASS[fact]), max_size=1)) if draw(st.booleans()) else []  # noqa: E731
    near = (*some(), draw(st.sampled_from(NEAR[fact])), *some())
    if fact == "gain":
        return Chain("norm", near, draw(st.sampled_from(["linear", "biased", "biased"])))
    if fact == "mean":
        start = draw(st.sampled_from(["stream", "stream", "stream", "norm"]))
        return Chain(start, near, draw(st.sampled_from(["raw", "norm", "norm", "instead"])))
    start = draw(st.sampled_from(["norm", "norm", "norm", "middle"]))
    layer = ("linear", draw(st.sampled_from([0, 1])))
    return Chain(start, (layer, *near), draw(st.sampled_from(["instead", "norm", "norm", "norm", "linear"])))


USED = {
    "gain": USUAL,
    "mean": ("layer", "layer without bias", "layer var"),
    "scale": ("rms", "rms 1+w", "rms divides", "rms without gain", "layer without bias", "layer without gain"),
}


def plain_probes(fact: str) -> list[Spec]:
    """Every operation near a fact by itself, where it matters most."""
    settings = {
        "gain": (("rms", "norm", (), "linear"), ("layer", "norm", (), "biased")),
        "mean": (("layer", "stream", (), "norm"), ("layer", "stream", (), "raw")),
        "scale": (("rms", "norm", (("linear", 0),), "norm"), ("rms", "norm", (("linear", 0),), "instead")),
    }
    return [
        Spec((Block("probe", norm, "", "", (Chain(start, (*before, op), end),)),), final_norm=norm)
        for op in dict.fromkeys(NEAR[fact])
        for norm, start, before, end in settings[fact]
    ]


@st.composite
def probes(draw: st.DrawFn) -> Spec:
    """A norm, what reads it, and another norm: small models in which little lies between a rule and the outputs."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    fact = pick("gain", "mean", "scale", "scale")
    kinds = st.sampled_from(USED[fact])
    chain = draw(pointed(fact))
    block = Block("probe", draw(kinds), "", "", (chain, draw(pointed(fact))) if pick(False, False, True) else (chain,))
    again = replace(block, norm=draw(kinds), weights_of=pick(None, 0), norm_of=pick(None, None, 0))
    return Spec(
        blocks=(block, again) if pick(False, False, False, True) else (block,),
        final_norm=draw(kinds),
        tied=pick(False, False, False, True),
        positions=pick("", "", "learned"),
        returns=pick((), (), (), ("stream",), ("hidden",)),
        width=pick(8, 12),
        batch=pick(2, 2, 2, 1),
        eps=pick(1e-5, 0.1, 1e-30),
        head_bias=draw(st.booleans()),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    pick, flag = lambda *options: draw(st.sampled_from(options)), st.sampled_from([False, False, True])
    return Block(
        placement=pick("pre", "pre", "post", "sandwich", "parallel"),
        norm=draw(NORM_NAMES),
        mixer=pick("attention", "attention", *MIXERS),
        mlp=pick(*MLPS),
        chains=tuple(draw(st.lists(chains(), max_size=2))),
        kv_heads=pick(1, 2),
        rope=pick("", "half", "interleaved", "partial"),
        qk_norm=pick("", "", "rms", "layer"),
        fused=draw(flag),
        window=draw(flag),
        spelled=draw(flag),
        softcap=draw(flag),
        biases=draw(st.integers(0, 31)),
        norm_of=pick(None, None, None, 0),
        weights_of=pick(None, None, None, 0),
        times=pick(1, 1, 1, 2),
        multiplier=pick(1.0, 1.0, 0.7),
    )


@st.composite
def transformers(draw: st.DrawFn) -> Spec:
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    first = draw(blocks())
    second = pick(None, None, draw(blocks()), _sharing(first, draw(NORM_NAMES), pick(None, 0)))
    return Spec(
        blocks=(first,) if second is None else (first, second),
        final_norm=pick("", *USUAL),
        tied=pick(False, False, True),
        positions=pick("", "learned", "fixed"),
        returns=tuple(draw(st.lists(st.sampled_from(["hidden", "stream", "pooled"]), max_size=1))),
        padding=draw(st.booleans()),
        width=pick(8, 12),
        length=pick(6, 8),
        batch=pick(2, 2, 2, 1),
        eps=pick(1e-5, 1e-5, 0.1, 1e-30),
        head_bias=pick(False, True),
    )


def _sharing(block: Block, norm: str, norm_of: int | None) -> Block:
    """A block with another's weights, and with its norms or its own."""
    return replace(block, norm=block.norm if norm_of is not None else norm, norm_of=norm_of, weights_of=0)


def specs(whole: int = 1) -> st.SearchStrategy[Spec]:
    """Probes, and among five models `whole` that are transformers."""
    return st.one_of(*(transformers() if i < whole else probes() for i in range(5)))
