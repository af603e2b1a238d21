"""Attention of one new token a sequence over a ragged, contiguous or paged, cache.

Source: Sanovar, Bharadwaj, St. Amant, Ruehle and Rajmohan, LeanAttention, 2024, arXiv:2405.10480; pages: Kwon et al.,
PagedAttention, 2023, arXiv:2309.06180.
Differs: partial results are merged in the order of the keys, so that every run gives the same bits; a sequence without
keys gives zeros.

It is `cache_attention` by the number of keys, not the position, and stays an op of its own: as one op, most of what it
declares (a first key, softcap, sinks, slopes) would have no kernel, and every call a launch more, to count from one.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops._gpu import HALVES, kernel, refusal
from taut.ops.cache_attention import cache_attention


@op
def decode_attention(
    q: Float[Tensor, "batch heads d"],
    k: Float[Tensor, "blocks kv_heads keys d"],
    v: Float[Tensor, "blocks kv_heads keys d"],
    lengths: Int[Tensor, " batch"],
    table: Int[Tensor, "batch pages"] | None = None,
    scale: float | None = None,
) -> Float[Tensor, "batch heads d"]:
    """softmax(q k^T scale) v over the first `lengths` keys of each sequence, rounded once to q's dtype.

    `heads` is a multiple of `kv_heads`; `scale` defaults to 1 / sqrt(d). Without a `table`, k and v hold a block a
    sequence. With one they hold pages of `keys` keys, and `table` says which pages, in order, a sequence has.
    """
    if table is not None:
        k, v = (t[table].transpose(1, 2).flatten(2, 3) for t in (k, v))
    unseen = torch.arange(k.shape[2], device=k.device) >= lengths[:, None]
    values = v.masked_fill(unseen[:, None, :, None], 0)
    return cache_attention.reference(q[:, :, None], k, values, lengths - 1, scale=scale)[:, :, 0]


@decode_attention.least
def _(q, k, v, lengths, table=None, scale=None) -> Work:
    """As if the cache were full: the lengths are data, which is not looked at."""
    keys = k.shape[2] * (1 if table is None else table.shape[1])
    cache = 2 * len(q) * k.shape[1] * keys * k.shape[3] * k.element_size()
    return Work(4 * q.numel() * keys, 2 * nbytes(q) + cache + nbytes(lengths, table))


@decode_attention.tests
def _(make):
    lengths = torch.tensor([9, 1, 0, 40])
    yield (make(4, 6, 16), make(4, 2, 40, 16), make(4, 2, 40, 16), lengths), {}
    yield (make(1, 4, 72), make(1, 1, 300, 72), make(1, 1, 300, 72), torch.tensor([257])), {"scale": 0.3}
    table = torch.tensor([[4, 0, 2], [1, 3, 3]])
    yield (make(2, 3, 24), make(5, 3, 7, 24), make(5, 3, 7, 24), torch.tensor([20, 7]), table), {}


MOST_KEYS = 2**28


def _fits(q, k, v, lengths, table=None, scale=None) -> Reason:
    if q.dtype not in HALVES or k.dtype != q.dtype or v.dtype != q.dtype:
        return f"q is {q.dtype}, k is {k.dtype}, v is {v.dtype}"
    if q.shape[-1] > 256:
        return f"heads of {q.shape[-1]} features"
    if k[..., 0].numel() > MOST_KEYS:
        return "so many keys that their tiles cannot be numbered"
    return refusal(q, k, v, lengths, table)


@decode_attention.impl("triton", when=_fits, opaque=True)
def _(q, k, v, lengths, table=None, scale=None):
    y = torch.empty_like(q, memory_format=torch.contiguous_format)
    return kernel("launch", "decode_attention")(q.contiguous(), k, v, lengths, table, y, scale)
