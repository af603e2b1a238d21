"""Grouped matrix product: every token through the weight of its own expert.

Source: Gale, Narayanan, Young and Zaharia, MegaBlocks, 2022, arXiv:2211.15841, section 4; the calling convention
(offsets are cumulative ends) is https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html.
Differs: tokens past the last offset give zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import op


@op
def expert_linear(
    x: Float[Tensor, "tokens k"], weight: Float[Tensor, "experts k n"], offsets: Int[Tensor, " experts"]
) -> Float[Tensor, "tokens n"]:
    """y[t] = x[t] weight[e], where e is the first expert with t < offsets[e].

    x is sorted by expert; `offsets` (int32) holds the end of each expert's tokens. An expert may have none.
    """
    expert = torch.searchsorted(offsets, torch.arange(len(x), device=x.device, dtype=offsets.dtype), right=True)
    y = x.new_zeros(x.shape[0], weight.shape[-1])
    for e in range(weight.shape[0]):
        y = torch.where((expert == e)[:, None], x @ weight[e], y)
    return y
