"""Leave out a norm's division where every path behind it is normalised again.

    rms_norm(s(a) b, e2)  =  b / sqrt(mean(b^2) + e2 (e1 + mean(a^2)))        s(a) = 1 / sqrt(mean(a^2) + e1)

`cancel_norm` gives every absorbing norm that epsilon, token by token, and is exact. `cancel_norm_plain` leaves the
epsilons alone, which saves the mean as well, and is as good as `plain_error` says. The norm's gain stays.

Source: Graef, Makraduli, Wasielewski and Clapp, FlashNorm: fast normalization for transformers, 2024,
arXiv:2407.09577, proposition 3.
Differs: the paper's form is exact up to epsilon, ours with it; legality is decided by the scale degree of every path,
which refuses multi-head latent attention's rotary slice and norms on queries and keys alone.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.degree import reach
from taut.graph import Graph
from taut.ops.layer_norm import layer_norm
from taut.ops.mean_square import mean_square
from taut.rewrite import TAUT, Exactness, Form, Rewrite, Site
from taut.rewrites._division import Carrier, absorb, cancels, divided, epsilon, leave_out, per_site

aten = torch.ops.aten


def sites(graph: Graph, form: Form) -> list[Site]:
    return per_site(graph, cancels)


def change(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        _cancel(graph, site, exactly=True)


def change_plain(graph: Graph, chosen: list[Site]) -> None:
    for site in chosen:
        _cancel(graph, site, exactly=False)


def _cancel(graph: Graph, site: Site, *, exactly: bool) -> None:
    norm = site.detail
    found = cancels(graph, norm)
    if isinstance(found, str):
        raise ValueError(f"cancel_norm at {site.where}: {found}")
    value = divided(graph, norm)
    if exactly:
        square = graph.insert(mean_square, (value,), norm)
        root = graph.insert(aten.add.Tensor, (square, epsilon(norm)), norm)
        absorb(Carrier(graph, found, root), found.absorbers, 1)
    leave_out(graph, norm, value)


def plain_error(graph: Graph, site: Site | str, inputs: Iterable[Mapping[str, Tensor]]) -> dict[str, float]:
    """What `cancel_norm_plain` does at a site: the largest relative error of each absorbing norm, by its module path.

    |1 - sqrt((M + e2) / (M + e2 (e1 + mean(a^2))))| over all tokens of the inputs, where M is the mean square of what
    the absorbing norm reads; measured in float64. Raises ValueError for a site that is refused.
    """
    here = {found.where: found for found in cancel_norm.find(graph)}
    where = site if isinstance(site, str) else site.where
    exact = cancel_norm.apply(graph, [where])
    absorbers = {absorber.norm.name for absorber in reach(graph, here[where].detail).absorbers}
    probe = _Probe({node.args[-1]: node for node in exact.nodes if node.name in absorbers})
    for example in inputs:
        exact.run(example, float64=True, watch=probe)
    return probe.errors


class _Probe:
    """Watches the per-token epsilons of absorbing norms, and what the norms read."""

    def __init__(self, norm_of: dict[Any, fx.Node]) -> None:
        self.norm_of, self.norms = norm_of, set(norm_of.values())
        self.plain: dict[fx.Node, Any] = {}
        self.errors: dict[str, float] = {}

    def __call__(self, node: fx.Node, value: Any, value_of: Any) -> Any:
        args: Any = node.args
        if node in self.norm_of:
            number = args[1]
            self.plain[node] = value_of(number) if isinstance(number, fx.Node) else number
        if node in self.norms:
            x, eps = value_of(args[0]), args[-1]
            x = x - x.mean(-1, keepdim=True) if node.target is layer_norm else x
            square = x.square().mean(-1, keepdim=True)
            error = 1 - torch.sqrt((square + self.plain[eps]) / (square + value_of(eps)))
            where = node.meta["where"] or node.name
            self.errors[where] = max(self.errors.get(where, 0.0), error.abs().max().item())
        return value


cancel_norm = Rewrite("cancel_norm", Exactness.ALGEBRAIC, sites, change, forms=(TAUT,), order=4)
cancel_norm_plain = Rewrite(
    "cancel_norm_plain", Exactness.BOUNDED, sites, change_plain, forms=(TAUT,), asked=True, order=4
)
