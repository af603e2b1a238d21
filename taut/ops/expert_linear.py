"""Grouped matrix product: every token through the weight of its own expert.

Source: Gale, Narayanan, Young and Zaharia, MegaBlocks, 2022, arXiv:2211.15841, section 4; the calling convention
(offsets are cumulative ends) is https://docs.pytorch.org/docs/stable/generated/torch.nn.functional.grouped_mm.html.
Differs: tokens past the last offset give zeros.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Work, nbytes, op


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


@expert_linear.least
def _(x, weight, offsets) -> Work:
    """As many experts are read as the tokens could reach."""
    tokens, k = x.shape
    experts, _, n = weight.shape
    read = min(tokens, experts) * k * n * weight.element_size()
    return Work(2 * tokens * k * n, nbytes(x, offsets) + read + tokens * n * x.element_size())


@expert_linear.tests
def _(make):
    yield (make(9, 16), make(4, 16, 24), torch.tensor([2, 2, 8, 9], dtype=torch.int32)), {}
    yield (make(5, 8), make(2, 8, 8), torch.tensor([0, 3], dtype=torch.int32)), {}
