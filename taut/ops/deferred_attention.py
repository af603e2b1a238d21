"""Attention whose softmax is divided behind the product with the values.

Source: Salmani and Soloveychik, LLM inference acceleration via efficient operation fusion, 2025, arXiv:2502.17728,
section on softmax.
Differs: the largest score is still found first; it is what keeps the exponentials finite.
"""

from __future__ import annotations

from jaxtyping import Bool, Float
from torch import Tensor

from taut.op import Work, op
from taut.ops._wide import wide
from taut.ops.attention import attention, exponentials


@op
def deferred_attention(
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
    """`attention`, divided once for each of the dv values in place of each of the keys."""
    weights, total = exponentials(q, k, mask, scale, causal, softcap, window, sinks, alibi)
    return (weights @ wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1) / total).to(q.dtype)


@deferred_attention.least
def _(*args, **kwargs) -> Work:
    assert attention.work is not None
    return attention.work(*args, **kwargs)


@deferred_attention.tests
def _(make):
    assert attention.cases is not None
    yield from attention.cases(make)
