"""Rows of a table by token id.

Source: Bengio, Ducharme, Vincent and Janvin, A Neural Probabilistic Language Model, 2003,
https://www.jmlr.org/papers/v3/bengio03a.html, section 2.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Work, nbytes, op


@op
def embedding(ids: Int[Tensor, "*batch"], weight: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "*batch d"]:
    """weight[ids]. Raises IndexError for an id outside the vocabulary."""
    return F.embedding(ids, weight)


@embedding.least
def _(ids, weight) -> Work:
    return Work(0, nbytes(ids) + 2 * ids.numel() * weight.shape[-1] * weight.element_size())


@embedding.tests
def _(make):
    yield (torch.randint(50, (3, 7)), make(50, 24)), {}
    yield (torch.tensor(2), make(5, 8)), {}
