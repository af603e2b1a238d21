"""What of the heads' norms, turns and appends goes into an attention's own step."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import is_move, move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_call
from taut.ops.cache_attention import cache_attention
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.ops.rope import rope
from taut.ops.rope_append import rope_append
from taut.runtime.parts import Parts
from taut.runtime.pieces import width
from taut.runtime.steps import Attend, Norm, Rotary, View
from taut.runtime.tables import Tables


class CannotLower(Exception):
    """The step touches its caches, or mixes rows, in a way that is not known; the message says where."""


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention's parts: the rows it takes, and what is done to them in its own step."""

    layer: int
    nodes: dict[str, Any]
    rotary: Rotary | None
    q_norm: Norm | None
    k_norm: Norm | None
    caches: tuple[fx.Node, fx.Node]


class Heads:
    """The attentions of a step graph; `absorbed` are the nodes that only their own steps need."""

    def __init__(self, graph: Graph, tables: Tables, parts: Parts) -> None:
        self.graph, self.tables, self.parts = graph, tables, parts
        self.rotaries: dict[Any, Rotary] = {}
        self.plans = {node: self._plan(node) for node in graph.calls(cache_attention)}
        self.absorbed = self._absorbed()

    def attend(self, node: Any, out: str, q: View, k: View | None, v: View | None) -> Attend:
        """The step of an attention; with no k and v its cache is another's."""
        plan, names = self.plans[node], ("first", "scale", "softcap", "sinks", "alibi")
        given = dict(zip(names, node.args[4:], strict=False)) | dict(node.kwargs)
        sizes = [shape(cache) for cache in plan.caches]
        first = self.graph.tensors[given["first"].meta["tensor"]] if given.get("first") is not None else None
        d, scale = sizes[0][3], given.get("scale")
        return Attend(
            out=out,
            q=q,
            k=k,
            v=v,
            layer=plan.layer,
            heads=shape(node)[1],
            kv_heads=sizes[0][1],
            d=d,
            dv=sizes[1][3],
            scale=d**-0.5 if scale is None else float(scale),
            rotary=plan.rotary,
            q_norm=plan.q_norm,
            k_norm=None if k is None else plan.k_norm,
            softcap=given.get("softcap"),
            first=first if first is not None and bool(first.any()) else None,
            alibi=self.parts.vector(given.get("alibi")),
            sinks=self.parts.vector(given.get("sinks")),
        )

    def _plan(self, node: Any) -> Attention:
        q, keys, values = node.args[:3]
        found = [self._cached(part) for part in (keys, values)]
        (layer, k_turn, k), (other, v_turn, v) = found
        if layer != other or v_turn is not None:
            raise CannotLower(f"{node.name} in {node.meta.get('where')}: keys and values are of different layers")
        q_turn, q = self._turned(q)
        if k_turn is None:
            k_turn, k = self._turned(k)
        q_norm, q_inner = self._head_norm(q)
        k_norm, k_inner = self._head_norm(k)
        rotary = [None if turn is None else self._rotary(*turn) for turn in (q_turn, k_turn)]
        nodes = {"q": q_inner, "k": k_inner, "v": v}
        plan = Attention(layer, nodes, rotary[1], q_norm, k_norm, (keys, values))
        if rotary[0] is not rotary[1] or (q_turn is not None and rotary[0] is None):
            raise CannotLower(f"{node.meta.get('where')}: queries and keys are turned by different tables")
        return plan

    def _cached(self, node: Any) -> tuple[int, Any, Any]:
        """(layer, how it is turned, what is appended) of appended keys or values."""
        layer = int(node.args[0].meta["tensor"].split(".")[1])
        if node.target is rope_append:
            _, x, _, *turn = node.args
            return layer, tuple(turn), x
        return layer, None, node.args[3]

    def _turned(self, node: Any) -> tuple[Any, Any]:
        """(cos, sin and their order, what is turned), each head by itself."""
        inner = self._same_row(node)
        by_head = is_call(inner, rope) and shape(inner)[-1] == shape(node)[-1]
        return (tuple(inner.args[1:]), inner.args[0]) if by_head else (None, node)

    def _same_row(self, node: Any) -> Any:
        """The value before views that leave the row as it is."""
        while is_move(node) and not is_getitem(node) and isinstance(node.args[0].meta["val"], Tensor):
            source = node.args[0]
            index = torch.arange(width(source)).view(shape(source))
            moved = move(node, index)
            if moved is None or not torch.equal(moved.flatten(), index.flatten()):
                break
            node = source
        return node

    def _head_norm(self, node: Any) -> tuple[Norm | None, Any]:
        inner = self._same_row(node)
        if not is_call(inner, rms_norm, layer_norm) or shape(inner)[-1] == width(inner):
            return None, node
        norm = self.parts.own_norm(inner) if shape(inner)[-1] == shape(node)[-1] else None
        return (None, node) if norm is None else (norm, inner.args[0])

    def _rotary(self, cos: Any, sin: Any, interleaved: bool = False) -> Rotary:
        key = cos, sin, interleaved
        if key not in self.rotaries:
            tables = [self.tables.table(node).reshape(self.tables.max_length, -1).float() for node in (cos, sin)]
            half = tables[0].shape[1] // 2
            parts = [(t[:, ::2], t[:, 1::2]) if interleaved else (t[:, :half], t[:, half:]) for t in tables]
            if any(not torch.equal(one, two) for one, two in parts):
                raise CannotLower("the two features of a pair are turned by different angles")
            made = Rotary(parts[0][0].contiguous(), parts[1][0].contiguous(), interleaved)
            known = (known for known in self.rotaries.values() if _same(known, made))
            self.rotaries[key] = next(known, made)
        return self.rotaries[key]

    def _absorbed(self) -> set[fx.Node]:
        ends, absorbed = set(self.plans), set()
        kept = {node for plan in self.plans.values() for node in plan.nodes.values()}
        for node in reversed(list(self.graph.nodes)):
            inside = bool(node.users) and all(user in ends or user in absorbed for user in node.users)
            if node.op == "call_function" and inside and node not in kept:
                absorbed.add(node)
        return absorbed


def _same(one: Rotary, two: Rotary) -> bool:
    return one.interleaved == two.interleaved and torch.equal(one.cos, two.cos) and torch.equal(one.sin, two.sin)
