"""Make an RMSNorm of a LayerNorm: centre what writes its input once, and its mean need not be taken every time.

    layer_norm(x) = rms_norm(x - mean(x)),  and x - mean(x) = the sum of all writers, each minus its own mean

Every reader of the stream must be blind to the mean, which a LayerNorm is, and every writer's parameter must be used
for this alone. Where the input has mean zero anyway, the norm changes and nothing else.

Source: Jiang, Gu, Zhu and Pan, Pre-RMSNorm and Pre-CRMSNorm Transformers, 2023, arXiv:2305.14858.
Differs: writers and readers are found by data flow; tied embeddings, post-norm and streams that are also returned or
read by anything but a LayerNorm are refused; convolutions, tokens and positions that stand in the stream are centred.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.mean import Means, Stream, constant_gain
from taut.graph import Graph, shape
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.values import Centred

aten = torch.ops.aten


@dataclass(eq=False)
class Centring:
    """One norm to change, with the parameters that must be centred, each along its axis."""

    norm: fx.Node
    writers: dict[str, int]
    together: tuple[Centring, ...] = ()


def sites(graph: Graph, form: Form) -> list[Site]:
    means = Means(graph)
    streams: dict[fx.Node, Stream] = {}
    centrings = {norm: Centring(norm, {}) for norm in graph.calls(layer_norm)}
    found: list[Site] = []
    for norm, centring in centrings.items():
        x: Any = norm.args[0]
        if means.is_zero(x, len(shape(norm)) - 1):
            found.append(Site(_where(norm), note="its input has mean zero as it is", detail=centring))
            continue
        if norm not in streams:
            stream = means.stream(norm)
            streams |= dict.fromkeys(stream.norms, stream)
        found.append(_site(centring, streams[norm], centrings))
    return found


def _where(norm: fx.Node) -> str:
    return norm.meta["where"] or norm.name


def _site(centring: Centring, stream: Stream, centrings: dict[fx.Node, Centring]) -> Site:
    where = _where(centring.norm)
    if stream.refused is not None:
        return Site(where, stream.refused)
    centring.writers = stream.writers
    centring.together = tuple(centrings[other] for other in stream.norms if other is not centring.norm)
    return Site(where, None, writes=tuple(sorted(stream.writers)), detail=centring)


def change(graph: Graph, chosen: list[Site]) -> None:
    writers = {name: axis for site in chosen for name, axis in site.detail.writers.items()}
    for name, axis in writers.items():
        graph.values[name] = Centred(graph.values[name], axis)
    for site in chosen:
        _without_mean(graph, site.detail.norm)


def _without_mean(graph: Graph, norm: fx.Node) -> None:
    """Put an RMSNorm in a LayerNorm's place; a folded gain and bias fall away."""
    x, gain, bias, eps = norm.args
    gain = None if gain is not None and constant_gain(graph, gain) == 1.0 else gain
    bias = None if bias is not None and constant_gain(graph, bias) == 0.0 else bias
    new = graph.insert(rms_norm, (x, gain, eps), norm)
    if bias is not None:
        new = _as_before(graph, graph.insert(aten.add.Tensor, (new, bias), norm), norm)
    norm.replace_all_uses_with(new)
    graph.fx.erase_node(norm)


def _as_before(graph: Graph, new: fx.Node, old: fx.Node) -> fx.Node:
    """In the dtype of the node that is replaced."""
    value: Any = old.meta["val"]
    if isinstance(value, Tensor) and new.meta["val"].dtype != value.dtype:
        return graph.insert(aten._to_copy.default, (new,), old, {"dtype": value.dtype})
    return new


center_norm_input = Rewrite(
    "center_norm_input",
    Exactness.ALGEBRAIC,
    sites,
    change,
    forms=(TAUT,),
    order=2,
    absent="the model has no LayerNorm",
)
