"""How the next token is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor, as_tensor

from taut.ops.sample import sample

Ints = Sequence[int] | Tensor


def as_list(values: Ints) -> list[int]:
    return values.tolist() if isinstance(values, Tensor) else list(values)


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn: as in `taut.ops.sample`; temperature 0 takes the likeliest."""

    temperature: float = 0.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    seed: int = 0

    def draw(self, logits: Tensor, requests: Ints, positions: Ints) -> list[int]:
        """A token for every row, whose last one stands at a position.

        Request i draws from a stream of its own, whatever else is in the batch.
        """
        seeds, places = self.seed + as_tensor(requests), 1 + as_tensor(positions)
        return sample(logits, self.temperature, self.top_k, self.top_p, self.min_p, seeds, places).tolist()
