"""QK normalisation: each head's queries and keys are normalised before they meet, which bounds the scores.

Source: Henry, Dachapally, Pawar and Chen, Query-Key Normalization for Transformers, 2020, arXiv:2010.04245.
Differs: a gain for each channel, as present models have it, in place of one trained scale for the product; queries and
    keys then have length about sqrt(d), and the scores keep their 1 / sqrt(d).
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn

from taut.nn.norm.rms_norm import RMSNorm


class QKNorm(nn.Module):
    """Normalises queries [..., d] and keys [..., d] over the channels of their head; one gain each for all heads."""

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.q_norm, self.k_norm = RMSNorm(d, eps), RMSNorm(d, eps)

    def forward(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        return self.q_norm(q), self.k_norm(k)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield QKNorm(16), (make(2, 4, 3, 16), make(2, 2, 3, 16))
