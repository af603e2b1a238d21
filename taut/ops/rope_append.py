"""Turn a new key by its position and put it into the cache, in one pass.

Source: Su et al., RoFormer, 2021, arXiv:2104.09864, eq. 34; the cache: Shazeer, 2019, arXiv:1911.02150, section 2.4.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops.rope import rope


@op
def rope_append(
    cache: Float[Tensor, "1 kv_heads positions d"],
    x: Float[Tensor, "1 kv_heads 1 d"],
    position: Int[Tensor, 1],
    cos: Float[Tensor, "*#batch 1 rotary"],
    sin: Float[Tensor, "*#batch 1 rotary"],
    interleaved: bool = False,
) -> Float[Tensor, "1 kv_heads positions d"]:
    """The cache with rope(x, cos, sin, interleaved) at `position`."""
    return cache.index_copy(2, position, rope.reference(x, cos, sin, interleaved).to(cache.dtype))


@rope_append.least
def _(cache, x, position, cos, sin, interleaved=False) -> Work:
    """As a function, which writes the whole cache; a program does it in place."""
    return Work(3 * x.numel(), 2 * nbytes(cache) + nbytes(x, cos, sin))


@rope_append.tests
def _(make):
    for interleaved in (False, True):
        half = make(1, 1, 1, 8)
        angles = half.repeat_interleave(2, -1) if interleaved else torch.cat((half, half), -1)
        yield (make(1, 3, 9, 16), make(1, 3, 1, 16), torch.tensor([4]), angles.cos(), angles.sin(), interleaved), {}
