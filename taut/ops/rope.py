"""Rotary position embedding.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from taut.op import Work, nbytes, op
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


@rope.least
def _(x, cos, sin, interleaved=False) -> Work:
    rotated = x[..., : cos.shape[-1]].numel()
    return Work(3 * rotated, 2 * nbytes(x) + nbytes(cos, sin))


@rope.tests
def _(make):
    for rotary, interleaved in ((16, False), (16, True), (8, False), (8, True)):
        half = make(1, 1, 5, rotary // 2)
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
        yield (make(2, 3, 5, 16), angles.cos(), angles.sin(), interleaved), {}
