"""Column-centred weights: a parametrisation under which a layer's output has zero mean over its features.

Source: Guo et al., Enjoy Your Layer Normalization with the Computational Efficiency of RMSNorm, 2026, arXiv:2605.14521
    (column-based weight centring: CCC for the constraint, CBWC for this training form).

A LayerNorm that reads only such layers is an RMSNorm. The projection is in the graph, so that the gradient is projected
with it; `torch.nn.utils.parametrize.remove_parametrizations` leaves the centred weight behind.
"""

from __future__ import annotations

from collections.abc import Iterator

from torch import Tensor, nn
from torch.nn.utils import parametrize


class CenteredOutput(nn.Module):
    """Subtracts from a parameter its mean over the axis `dim` of output features."""

    def __init__(self, dim: int = 0) -> None:
        super().__init__()
        self.dim = dim

    def forward(self, weight: Tensor) -> Tensor:
        return weight - weight.mean(self.dim, keepdim=True)


def center_output(layer: nn.Module) -> nn.Module:
    """Parametrise a linear, convolution or embedding layer in place so that its output has zero mean; returns it.

    Raises ValueError for other layers, whose output axis is not known.
    """
    plain_convolution = isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d)
    if not (plain_convolution or isinstance(layer, nn.Linear | nn.Embedding)):
        raise ValueError(f"{type(layer).__name__} is no linear, convolution or embedding layer: centre its weight by "
                         "registering CenteredOutput over its output axis")
    parametrize.register_parametrization(layer, "weight", CenteredOutput(-1 if isinstance(layer, nn.Embedding) else 0))
    if getattr(layer, "bias", None) is not None:
        parametrize.register_parametrization(layer, "bias", CenteredOutput())
    return layer


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield center_output(nn.Linear(24, 16)), (make(2, 3, 24),)
    yield center_output(nn.Conv1d(8, 16, 3)), (make(2, 8, 9),)
