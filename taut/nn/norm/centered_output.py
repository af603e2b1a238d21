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
    """Subtracts from a parameter its mean over the axis `dim` of output features, within each of `groups` of them."""

    def __init__(self, dim: int = 0, groups: int = 1) -> None:
        super().__init__()
        self.dim, self.groups = dim, groups

    def forward(self, weight: Tensor) -> Tensor:
        features = weight.movedim(self.dim, 0).unflatten(0, (self.groups, -1))
        return (features - features.mean(1, keepdim=True)).flatten(0, 1).movedim(0, self.dim)


def center_output(layer: nn.Module) -> nn.Module:
    """Parametrise a linear, convolution or embedding layer in place so that its output has zero mean; returns it.

    In a grouped convolution every group is centred by itself, since no other one reads its inputs. Raises ValueError
    for a depthwise convolution, of which nothing would be left, and for layers whose output axis is not known.
    """
    groups = layer.groups if isinstance(layer, nn.Conv1d | nn.Conv2d | nn.Conv3d) else 1
    if not isinstance(layer, nn.Linear | nn.Embedding | nn.Conv1d | nn.Conv2d | nn.Conv3d):
        raise ValueError(
            f"{type(layer).__name__} is no linear, convolution or embedding layer: register CenteredOutput on its "
            "parameters with the axis of its output features"
        )
    if groups > 1 and len(layer.weight) == groups:
        raise ValueError("a depthwise convolution has one output a group, which centring makes zero; leave it as it is")
    axis = -1 if isinstance(layer, nn.Embedding) else 0
    parametrize.register_parametrization(layer, "weight", CenteredOutput(axis, groups))
    if getattr(layer, "bias", None) is not None:
        parametrize.register_parametrization(layer, "bias", CenteredOutput())
    return layer


def cases(make) -> Iterator[tuple[nn.Module, tuple]]:
    yield center_output(nn.Linear(24, 16)), (make(2, 3, 24),)
    yield center_output(nn.Conv1d(8, 16, 3)), (make(2, 8, 9),)
