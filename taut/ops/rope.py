"""Rotary position embedding.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import op
from taut.ops._wide import wide


@op
def rope(
    x: Float[Tensor, "*batch length head"],
    cos: Float[Tensor, "*#batch length rotary"],
    sin: Float[Tensor, "*#batch length rotary"],
    interleaved: bool = False,
) -> Float[Tensor, "*batch length head"]:
    """Rotate pairs of features of x by the angles of its positions; in float32 or wider, rounded once to x's dtype.

    `cos` and `sin` broadcast to `x[..., :rotary]`, one value for every feature (each angle stands twice). Where
    `rotary` is less than the head, the features behind it pass unchanged. Pairs are (i, i + rotary / 2), or
    (2 i, 2 i + 1) where `interleaved`.
    """
    rotary = cos.shape[-1]
    h = wide(x[..., :rotary])
    if interleaved:
        turned = torch.stack((-h[..., 1::2], h[..., ::2]), -1).flatten(-2)
    else:
        turned = torch.cat((-h[..., rotary // 2 :], h[..., : rotary // 2]), -1)
    y = (h * cos + turned * sin).to(x.dtype)
    return y if rotary == x.shape[-1] else torch.cat((y, x[..., rotary:]), -1)
