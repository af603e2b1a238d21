"""Scaled dot-product attention with grouped heads, sliding window, sinks, softcap and ALiBi.

Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, eq. 1; grouped heads: Ainslie et al., GQA,
2023, arXiv:2305.13245; sinks: Xiao et al., 2023, arXiv:2309.17453; ALiBi: Press et al., 2021, arXiv:2108.12409.
Differs: a query that may see no key gives zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taut.op import op
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
    groups = q.shape[1] // k.shape[1]
    keys, values = (wide(t).repeat_interleave(groups, 1) for t in (k, v))
    scores = wide(q) @ keys.mT * (q.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    ago = _positions_ago(q.shape[2], k.shape[2], q.device)
    if alibi is not None:
        scores = scores - alibi[:, None, None] * ago
    if mask is not None and mask.dtype != torch.bool:
        scores = scores + mask
    scores = scores.masked_fill(~_visible(ago, mask, causal, window), float("-inf"))
    return (_softmax(scores, sinks) @ values).to(q.dtype)


def _positions_ago(length: int, keys: int, device: torch.device) -> Tensor:
    """(length, keys): how many positions before the query a key stands."""
    return torch.arange(keys - length, keys, device=device)[:, None] - torch.arange(keys, device=device)


def _visible(ago: Tensor, mask: Tensor | None, causal: bool, window: int | None) -> Tensor:
    visible = mask if mask is not None and mask.dtype == torch.bool else torch.ones_like(ago, dtype=torch.bool)
    if causal:
        visible = visible & (ago >= 0)
    return visible if window is None else visible & (ago < window)


def _softmax(scores: Tensor, sinks: Tensor | None) -> Tensor:
    peak = scores.detach().amax(-1, keepdim=True)
    if sinks is not None:
        peak = torch.maximum(peak, sinks.detach()[:, None, None])
    peak = peak.masked_fill(peak == float("-inf"), 0)
    weights = torch.exp(scores - peak)
    total = weights.sum(-1, keepdim=True)
    if sinks is not None:
        total = total + torch.exp(sinks[:, None, None] - peak)
    return weights / total.masked_fill(total == 0, 1)
