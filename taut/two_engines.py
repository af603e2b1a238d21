"""Cycles of a norm or softmax and the product behind it on two engines: one for products, one for all the rest.

    in turn      reduction + scaling + product
    interleaved  reduction + 1 + product             each part of the input is scaled while the one before is multiplied
    deferred     max(reduction, product) + 1         nothing waits but the scalar; outputs are scaled as they come

The one cycle is the pipeline's: the first part's scaling, or the last part's. Both hold where the product takes a part
no faster than the other engine scales one: n and k of at least `vector`.

Source: Graef et al., FlashNorm, 2024, arXiv:2407.09577 (24, 21 and 17 cycles); Salmani and Soloveychik, LLM inference
    acceleration via efficient operation fusion, 2025, arXiv:2502.17728 (collective operations hidden behind a product).
Differs: one formula serves both. Cycles may be fractions. Memory is not in it: what is bound by reading the weight
    gains less, and what is launched as separate kernels gains by their number (docs/normalization.md).
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Latency:
    """Cycles of the three parts for one token."""

    reduction: float
    scaling: float
    product: float

    @property
    def in_turn(self) -> float:
        return self.reduction + self.scaling + self.product

    @property
    def interleaved(self) -> float:
        return self.reduction + 1 + self.product

    @property
    def deferred(self) -> float:
        return max(self.reduction, self.product) + 1

    @property
    def exposed(self) -> float:
        """Cycles of the reduction that no product hides: 0 where the product takes as long or longer."""
        return max(0.0, self.reduction - self.product)

    @property
    def collective_share(self) -> float:
        """The reduction's share of the latency in turn: what deferring could hide at most."""
        return self.reduction / self.in_turn

    @property
    def saved(self) -> float:
        """Share of the latency in turn that deferring saves."""
        return 1 - self.deferred / self.in_turn


def norm_latency(n: int, k: int, vector: float, matrix: float | None = None) -> Latency:
    """A norm of n features and a product with a weight (n, k).

    The engines do `vector` and `matrix` operations a cycle, `matrix` by default the square of `vector`.
    """
    return Latency(n / vector, n / vector, n * k / (matrix or vector**2))


def softmax_latency(keys: int, features: int, vector: float, matrix: float | None = None) -> Latency:
    """The sum and the division of one query's weights over its keys, and their product with values (keys, features).

    The exponentials and the largest score are left out: neither can be put off.
    """
    return norm_latency(keys, features, vector, matrix)
