"""Rows of a table by token id.

Source: Bengio, Ducharme, Vincent and Janvin, A Neural Probabilistic Language Model, 2003,
https://www.jmlr.org/papers/v3/bengio03a.html, section 2.
"""

from __future__ import annotations

import torch.nn.functional as F
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import op


@op
def embedding(ids: Int[Tensor, "*batch"], weight: Float[Tensor, "vocabulary d"]) -> Float[Tensor, "*batch d"]:
    """weight[ids]. Raises IndexError for an id outside the vocabulary."""
    return F.embedding(ids, weight)
