"""SimpleRMSNorm: root-mean-square normalisation without a parameter; what FlashNorm leaves of an RMSNorm.

Source: Qin et al., TransNormerLLM, 2023, arXiv:2307.14995.
Differs: epsilon stands inside the root as in the authors' code; the paper writes none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from torch import nn

from taut.nn.norm.rms_norm import RMSNorm


class SimpleRMSNorm(RMSNorm):
    """y = sqrt(d) x / ||x|| over the last axis, for x [..., d]; no parameters."""

    def __init__(self, d: int | Sequence[int], eps: float = 1e-6) -> None:
        super().__init__(d, eps, gain="none")


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield SimpleRMSNorm(24), (make(2, 3, 24),)
