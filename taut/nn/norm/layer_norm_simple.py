"""LayerNorm-simple: layer normalisation without gain and bias.

Source: Xu, Sun, Zhang, Zhao and Lin, Understanding and Improving Layer Normalization, 2019, arXiv:1911.07013.
Differs: epsilon inside the root, as torch has it.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import nn


class LayerNormSimple(nn.LayerNorm):
    """y = (x - mean) / sqrt(var + eps) over the last axis, for x [..., d]; no parameters."""

    def __init__(self, d: int, eps: float = 1e-5) -> None:
        super().__init__(d, eps, elementwise_affine=False)


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield LayerNormSimple(24), (make(2, 3, 24),)
