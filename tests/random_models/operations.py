"""Operations that may follow each other; the number says how."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_models.mixers import rotate
from random_models.norms import USUAL

if TYPE_CHECKING:
    from random_models.model import Pass


Operation = Callable[["Pass", str, Tensor, int, Tensor], Tensor]


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
        rotate(x, ("half", "interleaved", "partial")[how % 3]) if x.ndim > 1 and x.shape[-1] % 4 == 0 else x
    ),
}
