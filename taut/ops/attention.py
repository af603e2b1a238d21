"""Scaled dot-product attention with grouped heads, sliding window, sinks, softcap and ALiBi.

Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al., GQA,
2023, arXiv:2305.13245; sinks: Xiao et al., 2023, arXiv:2309.17453; ALiBi: Press et al., 2021, arXiv:2108.12409.
Differs: a query that may see no key gives zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

from taut.op import Reason, Work, nbytes, op
from taut.ops._cpu import FLOATS, address, kernel, refusal, tag, threads
from taut.ops._wide import wide


@op
def attention(
    q: Float[Tensor, "batch heads length d"],
    k: Float[Tensor, "batch kv_heads keys d"],
    v: Float[Tensor, "batch kv_heads keys dv"],
    mask: Bool[Tensor, " ..."] | Float[Tensor, " ..."] | None = None,
    scale: float | None = None,
    causal: bool = False,
    softcap: float | None = None,
    window: int | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    alibi: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads length dv"]:
    """softmax(q k^T scale + mask) v, in float32 or wider, rounded once to q's dtype.

    The last query stands at the last key: query i has position `keys - length + i`. `heads` is a multiple of
    `kv_heads`. `scale` defaults to 1 / sqrt(d). `mask` broadcasts to (batch, heads, length, keys): True where a query
    may look, or numbers to add. `causal` hides later keys, `window` those `window` or more positions back.
    `softcap` c puts c tanh(s / c) in place of a score s, before the mask. `alibi` holds a slope a head, which
    multiplies key position less query position. `sinks` holds a logit a head, which only adds to the denominator.
    """
    weights, total = exponentials(q, k, mask, scale, causal, softcap, window, sinks, alibi)
    return (weights / total @ wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1)).to(q.dtype)


def exponentials(q, k, mask, scale, causal, softcap, window, sinks, alibi) -> tuple[Tensor, Tensor]:
    """Attention's weights before their division, (batch, heads, length, keys), and what divides them, (..., 1)."""
    return _exponentials(scores_of(q, k, mask, scale, causal, softcap, window, alibi), sinks)


def divided(scores: Tensor) -> Tensor:
    """Softmax over the keys; zeros for a query that may look at none."""
    weights, total = _exponentials(scores, None)
    return weights / total


def scores_of(q, k, mask, scale, causal, softcap, window, alibi) -> Tensor:
    """What the softmax reads, (batch, heads, length, keys), in float32 or wider; -inf where a query may not look."""
    keys = wide(k).repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = wide(q) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ago = _positions_ago(q.shape[2], k.shape[2], q.device)
    if alibi is not None:
        scores = scores - alibi[:, None, None] * ago
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    return scores.masked_fill(~_visible(ago, mask, causal, window), float("-inf"))


def _positions_ago(length: int, keys: int, device: torch.device) -> Tensor:
    """(length, keys): how many positions before the query a key stands."""
    return torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)


def _visible(ago: Tensor, mask: Tensor | None, causal: bool, window: int | None) -> Tensor:
    visible = mask if mask is not None and mask.dtype == torch.bool else torch.ones_like(ago, dtype=torch.bool)
    if causal:
        visible = visible & (ago >= 0)
    return visible if window is None else visible & (ago < window)


def _exponentials(scores: Tensor, sinks: Tensor | None) -> tuple[Tensor, Tensor]:
    peak = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach()[:, None, None])
    peak = peak.masked_fill(peak == float("-inf"), 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - peak)
    return weights, total.masked_fill(total == 0, 1)


@attention.least
def _(q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None) -> Work:
    """Only pairs that causality and the window leave are counted; a mask's content is not looked at."""
    batch, heads, length, d = q.shape
    keys, dv = k.shape[2], v.shape[3]
    seen = [_seen(keys - length + i, keys, causal, window) for i in range(length)]
    pairs = batch * heads * sum(last - first for first, last in seen)
    rows = max(last for _, last in seen) - min(first for first, _ in seen)
    cache = (nbytes(k) + nbytes(v)) * rows // keys
    written = batch * heads * length * dv * q.element_size()
    return Work(2 * pairs * (d + dv), nbytes(q, mask, sinks, alibi) + cache + written)


def _seen(position: int, keys: int, causal: bool, window: int | None) -> tuple[int, int]:
    """The half-open range of keys that a query looks at."""
    first = 0 if window is None else max(0, position - window + 1)
    return first, max(first, min(keys, position + 1) if causal else keys)


@attention.tests
def _(make):
    q, k, v = make(2, 6, 5, 16), make(2, 3, 9, 16), make(2, 3, 9, 24)
    yield (q, k, v), {}
    yield (q, k, v), {"causal": True, "window": 3, "scale": 0.3}
    yield (q, k, v), {"softcap": 2.0, "sinks": make(6), "alibi": make(6).abs(), "causal": True}
    yield (q, k, v, make(2, 1, 5, 9)), {}
    yield (q, k, v, torch.rand(2, 1, 5, 9) > 0.5), {}
    for d, keys in ((64, 700), (40, 30), (128, 300), (72, 17)):
        yield (make(2, 6, 1, d), make(2, 2, keys, d), make(2, 2, keys, d)), {"causal": True}
    q, k, v = make(2, 5, 1, 64), make(2, 1, 600, 64), make(2, 1, 600, 64)
    yield (q, k, v), {"window": 300, "alibi": make(5).abs(), "causal": True}
    yield (q, k, v), {"softcap": 2.0, "sinks": make(5), "scale": 0.3}
    yield (q, k, v, torch.arange(600) < 40), {}
    yield (q, k, v, make(2, 5, 1, 600)), {}


def _fits(q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None) -> Reason:
    if q.shape[2] != 1:
        return "more than one query"
    if q.dtype not in FLOATS or k.dtype != v.dtype or k.dtype not in FLOATS:
        return f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}"
    if k.stride(-1) != 1 or v.stride(-1) != 1:
        return "the features of the cache are not contiguous"
    if k.shape[2] == 0 or q.shape[1] % k.shape[1]:
        return "no keys, or heads that are no multiple of the key heads"
    if mask is not None and mask.shape[-1] != k.shape[2]:
        return "the mask is broadcast along the keys"
    return refusal(q) or refusal(k, v, mask, sinks, alibi, strided=True)


def _torch_fits(
    q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None
) -> Reason:
    if softcap is not None or sinks is not None or alibi is not None:
        return "torch's attention knows no softcap, sinks or ALiBi"
    if mask is not None and mask.dtype != torch.bool:
        return "torch's attention rounds a mask that is added"
    if q.dtype not in FLOATS or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}"
    return None


@attention.impl("torch", when=_torch_fits)
def _(q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None):
    length, keys = q.shape[2], k.shape[2]
    if mask is None and window is None and (length == keys or length == 1 or not causal):
        return scaled_dot_product_attention(q, k, v, is_causal=causal and length > 1, scale=scale, enable_gqa=True)
    visible = torch.atleast_2d(_visible(_positions_ago(length, keys, q.device), mask, causal, window))
    return scaled_dot_product_attention(q, k, v, visible, scale=scale, enable_gqa=True)


@attention.impl("numba", when=_fits, opaque=True)
def _(q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None):
    (batch, heads, _, d), (_, kv_heads, keys, dv) = q.shape, v.shape
    lowest = 0 if window is None else max(0, keys - window)
    step = max(CHUNK, -(-(keys - lowest) // MOST_CHUNKS))
    y = q.new_empty(batch, heads, 1, dv)
    mask = None if mask is None else mask.expand(batch, heads, 1, keys)
    mask = mask if mask is None or mask.stride(-1) == 1 else mask.contiguous()
    sinks, alibi = (None if t is None else t.float().contiguous() for t in (sinks, alibi))
    places = (address(q), address(k), _strides(k), address(v), _strides(v), address(y))
    sizes = (batch, heads, kv_heads, d, dv, lowest, keys, step)
    extras = (
        address(mask),
        _strides(mask),
        mask is not None and mask.dtype != torch.bool,
        address(sinks),
        address(alibi),
    )
    factors = (d**-0.5 if scale is None else scale, softcap or 0.0)
    kernel("decode", "attention")(*places, *sizes, *factors, *extras, threads(nbytes(k, v)), tag(q), tag(k), tag(mask))
    return y


CHUNK, MOST_CHUNKS = 256, 64


def _strides(t: Tensor | None) -> tuple[int, int, int]:
    """Bytes between sequences, heads and rows."""
    if t is None:
        return 0, 0, 0
    batch, head, row, _ = (step * t.element_size() for step in t.stride())
    return batch, head, row
