"""How the next token is drawn."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from taut.ops.sample import sample


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: as in `taut.ops.sample`; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def draw(self, logits: Tensor, requests: Tensor, positions: Tensor) -> Tensor:
        """A token for every row; request i draws from a stream of its own, whatever else is in the batch."""
        seeds = self.seed + requests
        return sample(logits, self.temperature, self.top_k, self.top_p, self.min_p, seeds, positions)
