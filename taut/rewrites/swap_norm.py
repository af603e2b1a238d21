"""Put another norm in the place of a model's own, to see what it would cost: an emulated unit, a cheaper estimate.

    gain * norm(x) + bias   ->   gain * other(x) + bias
    softmax(scores) V       ->   other(scores) V

Norms are found in the graph, so that a norm without a module of its own is swapped too, and so is attention's softmax.
The model stays as accurate as the other norm lets it: `taut.quality.compare` says how accurate that is.

Source: an evaluation, not an identity: the practice of Kim et al., 2024, arXiv:2412.04778 (section on OPT models), and
of McLean et al., 2026, arXiv:2603.13180, who put their norms into models and report the perplexity.
Differs: any module that maps [..., d] to [..., d] will do, and the model keeps its gains, biases and running statistics
of batch norms.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call

from taut.graph import Graph, shape
from taut.ops._wide import wide
from taut.ops.attention import attention, scores_of
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site

Factory = Callable[[str, int, float], nn.Module | None]
"""(kind, d, eps) to a norm of x [..., d] without gain and bias; kind is "rms_norm" or "layer_norm". None keeps it."""

BatchFactory = Callable[[int, float], nn.Module | None]
"""(channels, eps) to a batch norm of x [batch, channels, ...]; None keeps the model's.

Its parameters and buffers become the model's where they have torch's names, and `running_scale` becomes the deviation,
less the eps that such norms add to it.
"""

BATCH_NORM = torch.ops.aten.batch_norm.default


class Swapped:
    """What a graph calls in a norm's place."""

    def __init__(self, norm: nn.Module) -> None:
        self.norm, self.__name__ = norm, type(norm).__name__


class SwappedNorm(Swapped):
    """`norm` in the accuracy of its own, then the model's gain and bias."""

    def __call__(self, x: Tensor, gain: Tensor | None, bias: Tensor | None = None) -> Tensor:
        y = wide(self.norm(x))
        y = y if gain is None else y * gain
        return (y if bias is None else y + bias).to(x.dtype)


class SwappedSoftmax(Swapped):
    """Attention by another softmax. A query that may see no key gives zeros, whatever the unit says."""

    def __call__(self, q, k, v, mask=None, scale=None, causal=False, softcap=None, window=None, sinks=None, alibi=None):
        scores = scores_of(q, k, mask, scale, causal, softcap, window, alibi)
        weights = self.norm(scores).masked_fill(scores == -torch.inf, 0)
        return (weights @ wide(v).repeat_interleave(q.shape[1] // k.shape[1], 1)).to(q.dtype)


class SwappedBatchNorm(Swapped):
    """A batch norm with the model's statistics, gain and bias."""

    def __call__(self, x, gain, bias, mean, variance, training, momentum, eps, fast):
        ours = {"running_mean": mean, "running_var": variance, "running_scale": (variance + eps).sqrt() - eps}
        ours |= {name: t for name, t in (("weight", gain), ("bias", bias)) if t is not None}
        known = {name for name, _ in (*self.norm.named_parameters(), *self.norm.named_buffers())}
        return functional_call(self.norm, {name: t for name, t in ours.items() if name in known}, (x,)).to(x.dtype)


def swapping(
    factory: Factory | None = None, softmax: nn.Module | None = None, batch_norm: BatchFactory | None = None
) -> Rewrite:
    """The rewrite that puts what the factory makes in the place of every norm, and the softmax, a module of scores
    [..., keys] that are -inf where hidden, in the place of attention's."""

    def sites(graph: Graph, form: Form) -> list[Site]:
        found = [_norm(node, factory) for node in graph.calls(rms_norm, layer_norm) if factory]
        found += [_softmax(node, softmax) for node in graph.calls(attention) if softmax]
        return found + [_batch_norm(node, batch_norm) for node in graph.calls(BATCH_NORM) if batch_norm]

    return Rewrite("swap_norm", Exactness.BOUNDED, sites, _change, forms=(TAUT,), asked=True, order=9)


def _norm(norm: fx.Node, factory: Factory) -> Site:
    kind, eps = norm.target.name, norm.args[-1]  # type: ignore[union-attr]
    if isinstance(eps, fx.Node):
        return _site(norm, "its epsilon is computed for every token")
    other = factory(kind, shape(norm)[-1], eps)  # type: ignore[arg-type]
    return _site(norm, f"no other norm was given for a {kind}" if other is None else SwappedNorm(other))


def _softmax(node: fx.Node, softmax: nn.Module) -> Site:
    sinks = dict(enumerate(node.args)).get(8, node.kwargs.get("sinks"))
    return _site(node, SwappedSoftmax(softmax) if sinks is None else "a sink takes part in its softmax")


def _batch_norm(node: fx.Node, factory: BatchFactory) -> Site:
    _, _, _, mean, variance, training, _, eps, *_ = node.args
    if training or mean is None or variance is None:
        return _site(node, "its statistics are taken from the batch")
    other = factory(shape(node)[1], eps)  # type: ignore[arg-type]
    return _site(node, "no other batch norm was given" if other is None else SwappedBatchNorm(other.eval()))


def _site(node: fx.Node, other: Swapped | str) -> Site:
    where = node.meta["where"] or node.name
    return Site(where, other) if isinstance(other, str) else Site(where, detail=(node, other))


def _change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        norm, other = site.detail
        args = norm.args if norm.target in (attention, BATCH_NORM) else norm.args[:-1]  # a swapped norm has its epsilon
        with graph.fx.inserting_before(norm):
            new = graph.fx.call_function(other, args, norm.kwargs)
        new.meta = dict(norm.meta)
        norm.replace_all_uses_with(new)
        graph.fx.erase_node(norm)


def swap_norm(
    model: nn.Module,
    factory: Factory | None = None,
    example: Mapping[str, Tensor] | None = None,
    *,
    softmax: nn.Module | None = None,
    batch_norm: BatchFactory | None = None,
) -> nn.Module:
    """The model with its norms swapped: keyword tensors in, a dictionary of outputs out; the model itself stays.

    `softmax` and `batch_norm` as in `swapping`. The result takes the keywords of the example; without one, the model's
    main input (token ids) alone.

    Raises ValueError where nothing is swapped, and CannotTrace with the reason.
    """
    from taut.lift import lift
    from taut.module import GraphModule
    from taut.shrink import example_inputs
    from taut.tracing import trace

    if example is None:
        name: Any = model.main_input_name
        example = {name: example_inputs(model)[name]}
    lifted = lift(trace(model, example, symbolic=True))
    rewrite = swapping(factory, softmax, batch_norm)
    chosen = [site for site in rewrite.find(lifted) if site.refused is None]
    if not chosen:
        raise ValueError("no norm of this model was swapped: nothing was given in place of one, or there is none")
    swapped = GraphModule(rewrite.apply(lifted, chosen))
    targets = (node.target for node in swapped.graph.nodes)
    swapped.norms = nn.ModuleList(target.norm for target in targets if isinstance(target, Swapped))
    return swapped
