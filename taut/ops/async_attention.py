"""Attention whose partial sums share one preset maximum, and so need not wait for one another.

Source: Hong et al., FlashDecoding++: Faster Large Language Model Inference on GPUs, 2023, arXiv:2311.01282, section 3.
Differs: only the rows that leave the interval are computed again. Where the interval comes from:
`taut.nn.mixer.async_softmax.calibrate`.
"""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from taut.op import Reason, Work, op
from taut.ops._wide import wide
from taut.ops.attention import attention, divided, scores_of


@op
def async_attention(
    q: Float[Tensor, "batch heads length d"],
    k: Float[Tensor, "batch kv_heads keys d"],
    v: Float[Tensor, "batch kv_heads keys dv"],
    low: float,
    high: float,
    phi: float,
    mask: Bool[Tensor, " ..."] | Float[Tensor, " ..."] | None = None,
    scale: float | None = None,
    causal: bool = False,
    splits: int = 4,
) -> tuple[Float[Tensor, "batch heads length dv"], Bool[Tensor, "batch heads length"]]:
    """`attention`, and which queries had a score outside of (low, high) and took ordinary softmax.

    `phi` is subtracted from the scores of all other queries before the exponential, whose sums are taken over `splits`
    parts of the keys.
    """
    scores, values = scores_of(q, k, mask, scale, causal, None, None, None), _values(q, k, v)
    y, left = _preset(scores, values, low, high, phi, splits)
    return torch.where(left[..., None], divided(scores) @ values, y).to(q.dtype), left


def _values(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1)


def _preset(scores: Tensor, values: Tensor, low: float, high: float, phi: float, splits: int) -> tuple[Tensor, Tensor]:
    """Attention under the preset maximum, and the rows that may not have it: with a score outside, or with no sum."""
    hidden, weights = scores == -torch.inf, (scores - phi).exp()
    parts = zip(weights.tensor_split(splits, -1), values.tensor_split(splits, -2), strict=True)
    sums = [(w @ part, w.sum(-1, keepdim=True)) for w, part in parts]
    total = torch.stack([s[1] for s in sums]).sum(0)
    outside = (~hidden & ~((scores > low) & (scores < high))).any(-1)
    left = outside | ((total == 0)[..., 0] & ~hidden.all(-1))
    return torch.stack([s[0] for s in sums]).sum(0) / total.masked_fill(total == 0, 1), left


@async_attention.least
def _(q, k, v, low, high, phi, mask=None, scale=None, causal=False, splits=4) -> Work:
    assert attention.work is not None
    return attention.work(q, k, v, mask, scale, causal) + Work(0, q.numel() // q.shape[-1])


@async_attention.tests
def _(make):
    q, k, v = make(2, 6, 5, 16), make(2, 3, 37, 16), make(2, 3, 37, 24)
    yield (q, k, v, -20.0, 20.0, 20.0), {"causal": True}
    yield (q, k, v, -1.0, 1.0, 0.0), {"splits": 37, "scale": 0.3}
    mask = torch.rand(2, 1, 5, 37) > 0.5
    mask[0, 0, 0] = False
    yield (q, k, v, -20.0, 20.0, 6.5, mask), {"splits": 1}


def _fits(q, k, v, low, high, phi, mask=None, scale=None, causal=False, splits=4) -> Reason:
    if q.is_meta:
        return "a tensor is on meta"
    graded = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in (q, k, v, mask))
    return "a gradient is asked for" if graded else None


@async_attention.impl("torch", when=_fits, opaque=True)
def _(q, k, v, low, high, phi, mask=None, scale=None, causal=False, splits=4):
    """Ordinary softmax for the rows that need it, if there are any."""
    scores, values = scores_of(q, k, mask, scale, causal, None, None, None), _values(q, k, v)
    y, left = _preset(scores, values, low, high, phi, splits)
    if left.any():
        batch, head, _ = where = left.nonzero(as_tuple=True)
        y[where] = (divided(scores[where])[:, None] @ values[batch, head])[:, 0]
    return y.to(q.dtype), left
