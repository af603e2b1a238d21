"""Put another norm in the place of a model's own, to see what it would cost: an emulated unit, a cheaper estimate.

    gain * norm(x) + bias   ->   gain * other(x) + bias

Norms are found in the graph, so that a norm without a module of its own is swapped too. The model stays as accurate as
the other norm lets it: `taut.quality.compare` says how accurate that is.

Source: an evaluation, not an identity: the practice of Kim et al., 2024, arXiv:2412.04778 (section on OPT models), and
of McLean et al., 2026, arXiv:2603.13180, who put their norms into models and report the perplexity.
Differs: any module that maps [..., d] to [..., d] will do, and the model keeps its gains and biases.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, fx, nn

from taut.graph import Graph, shape
from taut.ops._wide import wide
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site

Factory = Callable[[str, int, float], nn.Module | None]
"""(kind, d, eps) to a norm of x [..., d] without gain and bias; kind is "rms_norm" or "layer_norm". None keeps it."""


class Swapped:
    """What a graph calls in place of a norm: `norm` in the accuracy of its own, then the model's gain and bias."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.__name__ = norm, type(norm).__name__

    def __call__(self, x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
        y = wide(self.norm(x))
        y = y if gain is None else y * gain
        return (y if bias is None else y + bias).to(x.dtype)


def swapping(factory: Factory) -> Rewrite:
    """The rewrite that puts what the factory makes in the place of every norm."""

    def sites(graph: Graph, form: Form) -> list[Site]:
        return [_site(norm, factory) for norm in graph.calls(rms_norm, layer_norm)]

    return Rewrite("swap_norm", Exactness.BOUNDED, sites, _change, forms=(TAUT,), asked=True, order=9)


def _site(norm: fx.Node, factory: Factory) -> Site:
    where, kind = norm.meta["where"] or norm.name, norm.target.name  # type: ignore[union-attr]
    eps: Any = norm.args[-1]
    if isinstance(eps, fx.Node):
        return Site(where, "its epsilon is computed for every token")
    other = factory(kind, shape(norm)[-1], eps)
    return Site(where, f"no other norm was given for a {kind}") if other is None else Site(where, detail=(norm, other))


def _change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        norm, other = site.detail
        x, *parts = norm.args[:-1]
        with graph.fx.inserting_before(norm):
            new = graph.fx.call_function(Swapped(other), (x, *parts))
        new.meta = dict(norm.meta)
        norm.replace_all_uses_with(new)
        graph.fx.erase_node(norm)


def swap_norm(model: nn.Module, factory: Factory, example: Mapping[str, Tensor] | None = None) -> nn.Module:
    """The model with its norms swapped: keyword tensors in, a dictionary of outputs out; the model itself stays.

    The result takes the keywords of the example; without one, the model's main input (token ids) alone.

    Raises ValueError where the factory gives no norm for any of the model's, and CannotTrace with the reason.
    """
    from taut.lift import lift
    from taut.module import GraphModule
    from taut.shrink import example_inputs
    from taut.tracing import trace

    if example is None:
        name: Any = model.main_input_name
        example = {name: example_inputs(model)[name]}
    lifted = lift(trace(model, example, symbolic=True))
    rewrite = swapping(factory)
    chosen = [site for site in rewrite.find(lifted) if site.refused is None]
    if not chosen:
        raise ValueError("no norm of this model was swapped: the factory gave None for all of them, or there is none")
    swapped = GraphModule(rewrite.apply(lifted, chosen))
    targets = (node.target for node in swapped.graph.nodes)
    swapped.norms = nn.ModuleList(target.norm for target in targets if isinstance(target, Swapped))
    return swapped
