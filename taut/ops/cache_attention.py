"""Attention of one new token a sequence over its cache: from the first position that it may see to its own.

Source: Shazeer, Fast Transformer Decoding, 2019, arXiv:1911.02150, section 2.4 (incremental attention over a cache);
sliding windows: Beltagy et al., Longformer, 2020, arXiv:2004.05150; ALiBi: Press et al., 2021, arXiv:2108.12409.
Differs: which keys are seen is an interval by position, not a mask, so that nothing else of the cache is read.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops.attention import attention


@op
def cache_attention(
    q: Float[Tensor, "batch heads 1 d"],
    keys: Float[Tensor, "batch kv_heads positions d"],
    values: Float[Tensor, "batch kv_heads positions dv"],
    position: Int[Tensor, " batch"],
    first: Int[Tensor, " positions"] | None = None,
    scale: float | None = None,
    softcap: float | None = None,
    sinks: Float[Tensor, " heads"] | None = None,
    alibi: Float[Tensor, " heads"] | None = None,
) -> Float[Tensor, "batch heads 1 dv"]:
    """Row b attends from `first[position[b]]` (0 where None) to `position[b]`, both included.

    `scale`, `softcap`, `sinks` and `alibi` as in `attention`: a slope multiplies key position less query position.
    """
    place = torch.arange(keys.shape[2], device=q.device)
    ago = position[:, None, None, None] - place
    start = torch.zeros_like(position) if first is None else first[position]
    mask = (ago >= 0) & (place >= start[:, None, None, None])
    if alibi is not None:
        mask = torch.where(mask, -alibi[:, None, None] * ago, float("-inf"))
    return attention.reference(q, keys, values, mask, scale, False, softcap, None, sinks)


@cache_attention.least
def _(q, keys, values, position, first=None, scale=None, softcap=None, sinks=None, alibi=None) -> Work:
    """All positions are counted: how many are seen is not known from shapes."""
    pairs = q.shape[0] * q.shape[1] * keys.shape[2]
    written = q.shape[0] * q.shape[1] * values.shape[3] * q.element_size()
    return Work(2 * pairs * (keys.shape[3] + values.shape[3]), nbytes(q, keys, values, sinks, alibi) + written)


@cache_attention.tests
def _(make):
    q, keys, values = make(2, 6, 1, 16), make(2, 3, 9, 16), make(2, 3, 9, 24)
    position = torch.tensor([4, 8])
    yield (q, keys, values, position), {"scale": 0.3}
    yield (q, keys, values, position, (torch.arange(9) - 3).clamp_min(0)), {"softcap": 2.0, "sinks": make(6)}
    yield (q, keys, values, position), {"alibi": make(6).abs()}
