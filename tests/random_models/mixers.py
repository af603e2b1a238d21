"""What mixes tokens, and what mixes features."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_models.spec import HEADS, Block

if TYPE_CHECKING:
    from random_models.model import Pass


def rotate(x: Tensor, kind: str) -> Tensor:
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
        q, k = rotate(q, b.rope), rotate(k, b.rope)
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
