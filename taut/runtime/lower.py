"""From a step graph to a program: one word for a node, and torch for what has none.

One token stands in a row, so every value of the graph is a row of numbers: views and transpositions of axes of size
one are the same row, a slice is a part of it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from dataclasses import replace as with_
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import GATHERS, is_move, move
from taut.graph import Graph, call, is_getitem, shape
from taut.lift._match import is_call
from taut.op import Op
from taut.ops.cache_attention import cache_attention
from taut.ops.fused_glu import fused_glu
from taut.ops.fused_linear import fused_linear
from taut.ops.layer_norm import layer_norm
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm
from taut.rewrite import STEP
from taut.rewrites._fused import options
from taut.rewrites.decode_attention import decode_attention
from taut.runtime.experts import Experts, choices, picked
from taut.runtime.gathers import without_gathers
from taut.runtime.heads import CannotLower, Heads
from taut.runtime.parts import Convert, Parts
from taut.runtime.pieces import Gather, Piece, width
from taut.runtime.step import TOKEN
from taut.runtime.steps import (
    Combine,
    Embed,
    Glu,
    Linear,
    Normalize,
    Program,
    Step,
    Torch,
    View,
    Weight,
)
from taut.runtime.tables import BY_POSITION, CONSTANT, LIVE, Tables

aten = torch.ops.aten
EXACT = 1 << 24
"""Up to which float32 holds every integer."""
PRODUCTS = (linear, fused_linear, fused_glu, cache_attention, rms_norm, layer_norm)


@dataclass(frozen=True, eq=False)
class Picked:
    """Columns of a value that are no interval; a row of them is made when it is needed."""

    source: View
    index: Tensor


def lower(graph: Graph, convert: Convert = Weight) -> Program:
    """The program of a prepared step graph. Raises CannotLower with the reason."""
    return Lowering(graph, convert).program()


class Lowering:
    def __init__(self, graph: Graph, convert: Convert) -> None:
        self.graph, self.tables = graph, Tables(graph)
        self.parts = Parts(graph, self.tables, convert)
        self.heads = Heads(graph, self.tables, self.parts)
        self.choices = choices(graph, self.tables)
        self.absorbed = self.heads.absorbed | picked(self.choices)
        self.steps: list[Step] = []
        self.widths: dict[str, int] = {}
        self.names: dict[str, str] = {}
        self.where = ""
        self.at: dict[fx.Node, Any] = {}
        self.made_by: dict[str, Step] = {}
        self.pending: list[fx.Node] = []
        self.words: dict[Any, Callable[[Any], bool]] = {
            aten.embedding.default: self._embedding,
            linear: self._linear,
            fused_linear: self._linear,
            fused_glu: self._glu,
            rms_norm: self._norm,
            layer_norm: self._norm,
            cache_attention: self._attention,
            aten.add.Tensor: self._sum,
            aten.mul.Tensor: self._product,
            aten.div.Tensor: self._product,
        }

    def program(self) -> Program:
        for node in self.graph.nodes:
            if node.op == "call_function" and self.tables.kinds[node] == LIVE and node not in self.absorbed:
                self.where = node.meta.get("where", "")
                self._node(node)
        result: Any = self.graph.output.args[0]
        logits = self._row(result[0])
        if (logits.start, logits.stop) != (0, self.widths[logits.buffer]):
            logits = self._emit(Combine(self._new(logits.stop - logits.start), logits))
        caches = self._caches()
        program = Program(tuple(self.steps), self.widths, logits.buffer, caches, self.tables.max_length, self.names)
        return without_gathers(program)

    def _caches(self) -> tuple[tuple[int, int, int], ...]:
        inputs = self.tables.caches
        count = sum(name.startswith("keys.") for name in inputs)
        sizes = [(shape(inputs[f"keys.{i}"]), shape(inputs[f"values.{i}"])) for i in range(count)]
        return tuple((k[1], k[3], v[3]) for k, v in sizes)

    # One node

    def _node(self, node: fx.Node) -> None:
        if self._is_token(node):
            return
        if node in self.choices:
            self._experts(node)
            return
        if node.target not in PRODUCTS and any(source in self.pending for source in node.all_input_nodes):
            self._later(node)  # what torch has begun it also ends
            return
        if is_move(node) and self._move(node):
            return
        word = self.words.get(node.target)
        if word is None or not word(node):
            self._later(node)

    def _later(self, node: fx.Node) -> None:
        """Leave a node to torch, together with those that follow it."""
        cache = next((n for n in node.all_input_nodes if n.op == "placeholder" and n.meta["kind"] == "input"), None)
        if cache is not None and cache.meta["tensor"] != TOKEN:
            refused = [site.refused for site in decode_attention.find(self.graph, STEP) if site.refused]
            why = refused[0] if refused else "it is no attention that taut knows"
            raise CannotLower(f"{node.meta.get('where') or node.name} uses its cache in a way that is not known: {why}")
        self.pending.append(node)

    def _move(self, node: Any) -> bool:
        source = node.args[0]
        if is_getitem(node) and isinstance(self.at.get(source), list):
            self.at[node] = self.at[source][node.args[1]]
            return True
        base = self.at.get(source)
        others = [n for n in node.all_input_nodes if n is not source]
        if not isinstance(base, View | Picked) or any(self.tables.kinds[n] != CONSTANT for n in others):
            return False
        moved = self._moved(node, torch.arange(width(source)).view(shape(source)))
        many = isinstance(moved, list | tuple)
        self.at[node] = [self._picked(base, m) for m in moved] if many else self._picked(base, moved)
        return True

    def _moved(self, node: Any, index: Tensor) -> Any:
        """A movement of an index array; what it picks by is a constant that is known here."""
        if node.target in GATHERS:
            return call(node, lambda n: index if n is node.args[0] else self.parts.constant(n), torch.device("cpu"))
        return move(node, index)

    def _picked(self, base: View | Picked, index: Tensor) -> View | Picked:
        flat = index.flatten()
        if isinstance(base, Picked):
            return Picked(base.source, base.index[flat])
        start = int(flat[0]) if len(flat) else 0
        if torch.equal(flat, torch.arange(start, start + len(flat))):
            return View(base.buffer, base.start + start, base.start + start + len(flat))
        return Picked(base, flat)

    def _row(self, node: fx.Node) -> View:
        """Where a node's value stands, made if need be."""
        if node in self.at:
            place = self.at[node]
            if isinstance(place, Picked):
                place = self.at[node] = self._gathered(place)
            return place
        if self._is_token(node):
            self.at[node] = self._token_row()
            return self.at[node]
        if self.tables.kinds[node] == BY_POSITION:
            table = self.tables.table(node).reshape(self.tables.max_length, -1).float()
            self.at[node] = self._emit(Embed(self._new(table.shape[1]), None, positions=Weight(table)))
            return self.at[node]
        if node in self.pending:
            self._flush()
        if node not in self.at:
            raise CannotLower(f"{node.name} in {node.meta.get('where')} is read before it is computed")
        return self._row(node)

    def _token_row(self) -> View:
        """The token itself as a number, for what is computed of it: looked up in a table of numbers."""
        tables = (node.args[0] for node in self.graph.calls(aten.embedding.default) if self._is_token(node.args[1]))
        known = max((shape(table)[0] for table in tables), default=0)  # type: ignore[arg-type]
        if not 0 < known <= EXACT:
            raise CannotLower("the model does more with its token than to embed it")
        return self._emit(Embed(self._new(1), Weight(torch.arange(float(known))[:, None])))

    def _gathered(self, picked: Picked) -> View:
        out = self._new(len(picked.index))
        return self._emit(Torch((out,), (picked.source,), Gather(picked.index), "its columns are no interval"), out)

    def _flush(self) -> None:
        """Make one piece of the nodes left to torch so far."""
        nodes, self.pending = self._with_movements(self.pending), []
        inside = set(nodes)
        outside = [n for node in nodes for n in node.all_input_nodes if n not in inside]
        constants = {n: self.parts.constant(n) for n in outside if self.tables.kinds[n] == CONSTANT}
        inputs = tuple(dict.fromkeys(n for n in outside if self.tables.kinds[n] != CONSTANT))
        views = tuple(self._row(n) for n in inputs)
        outs = tuple(n for n in nodes if isinstance(n.meta["val"], Tensor) and any(u not in inside for u in n.users))
        names = tuple(self._new(width(n)) for n in outs)
        where = nodes[0].meta.get("where") or "the model"
        named = dict.fromkeys(_named(n) for n in [n for n in nodes if not is_move(n)] or nodes)
        why = f"no word for {', '.join(named)} in {where}"
        self._emit(Torch(names, views, Piece(tuple(nodes), inputs, outs, constants), why), names[0])
        self.names |= dict.fromkeys(names, where)
        for node, name in zip(outs, names, strict=True):
            self.at[node] = View(name, 0, self.widths[name])

    def _with_movements(self, nodes: list[fx.Node]) -> list[fx.Node]:
        """The nodes, and before them the movements whose columns are no interval: torch moves them too."""
        inside, edge = set(nodes), list(nodes)
        while edge:
            for source in edge.pop().all_input_nodes:
                if source not in inside and isinstance(self.at.get(source), Picked | list):
                    inside.add(source)
                    edge.append(source)
        return sorted(inside)

    # Steps and their parts

    def _new(self, size: int) -> str:
        name = f"b{len(self.widths)}"
        self.widths[name], self.names[name] = size, self.where
        return name

    def _emit(self, step: Step, out: str | None = None) -> View:
        name = out or step.out  # type: ignore[union-attr]
        self.steps.append(step)
        self.made_by[name] = step
        return View(name, 0, self.widths[name])

    # Words

    def _embedding(self, node: Any) -> bool:
        table, index = node.args[:2]
        if self.tables.kinds[table] != CONSTANT or not self._is_token(index) or len(node.args) > 3:
            return False
        self.at[node] = self._emit(Embed(self._new(width(node)), self.parts.weight(table)))
        return True

    def _is_token(self, node: Any) -> bool:
        while is_move(node):
            node = node.args[0]
        return node.op == "placeholder" and node.meta["tensor"] == TOKEN

    def _linear(self, node: Any) -> bool:
        x, weight, given = node.args[0], node.args[1], options(node)
        if self.tables.kinds[weight] != CONSTANT or width(x) != shape(x)[-1]:
            return False
        residual = given.get("residual")
        self.at[node] = self._emit(
            Linear(
                x=self._row(x),
                weight=self.parts.weight(weight),
                bias=self.parts.vector(given.get("bias")),
                norm=self.parts.norm_of(given),
                activation=given.get("act"),
                scale=given.get("factor", 1.0),
                softcap=given.get("softcap"),
                residual=None if residual is None else self._row(residual),
                out=self._new(width(node)),
            )
        )
        return True

    def _experts(self, node: fx.Node) -> None:
        choice, out = self.choices[node], self._new(width(node))
        weight = self.parts.stored(choice.weight)
        run = Experts(weight.mT.contiguous() if choice.turned else weight)
        views = self._row(choice.x), self._row(choice.ids)
        why = f"no word for experts in {node.meta.get('where') or 'the model'}"
        self.at[node] = self._emit(Torch((out,), views, run, why), out)

    def _glu(self, node: Any) -> bool:
        x, gate, up, act = node.args
        given = dict(node.kwargs)
        if width(x) != shape(x)[-1]:
            return False
        biases = self.parts.vector(given.get("gate_bias")), self.parts.vector(given.get("up_bias"))
        row, norm = self._row(x), self.parts.norm_of(given)
        step = Glu(self._new(width(node)), row, self.parts.weight(gate), self.parts.weight(up), act, *biases, norm)
        self.at[node] = self._emit(step)
        return True

    def _norm(self, node: Any) -> bool:
        x, norm = node.args[0], self.parts.own_norm(node)
        if norm is None or width(x) != shape(x)[-1]:
            return False
        self.at[node] = self._emit(Normalize(x=self._row(x), norm=norm, out=self._new(width(node))))
        return True

    def _sum(self, node: Any) -> bool:
        if node.kwargs or not all(isinstance(arg, fx.Node) for arg in node.args):
            return False
        live = [arg for arg in node.args if self.tables.kinds[arg] == LIVE]
        if len(live) == 1:
            return self._add_positions(node, live[0], node.args[1] if node.args[0] is live[0] else node.args[0])
        if any(width(arg) != width(node) for arg in node.args):
            return False
        for one, two in (node.args, node.args[::-1]):
            if self._add_to_norm(node, one, two):
                return True
        a, b = (self._row(arg) for arg in node.args)
        self.at[node] = self._emit(Combine(self._new(width(node)), a, b))
        return True

    def _add_to_norm(self, node: fx.Node, one: fx.Node, two: fx.Node) -> bool:
        """norm(x) + residual: the norm's step is taken back and done here."""
        place = self.at.get(one)
        step = self.made_by.get(place.buffer) if isinstance(place, View) else None
        if not isinstance(step, Normalize) or step.residual is not None or len(one.users) > 1 or one is two:
            return False
        residual = self._row(two)
        self.steps.remove(step)
        self.at[node] = self._emit(with_(step, residual=residual))
        return True

    def _embedded(self, node: fx.Node) -> Embed | None:
        """The step that embeds a token, if nothing else reads what it makes."""
        place = self.at.get(node)
        step = self.made_by.get(place.buffer) if isinstance(place, View) else None
        alone = len(node.users) == 1 and isinstance(step, Embed) and step is self.steps[-1]
        return step if alone and place == View(step.out, 0, self.widths[step.out]) else None  # type: ignore

    def _add_positions(self, node: Any, live: fx.Node, other: Any) -> bool:
        step = self._embedded(live)
        if step is None or step.positions is not None or self.tables.kinds[other] != BY_POSITION:
            return False
        if width(other) != width(node):
            return False
        positions, offset = self._learned(other)
        self.steps.pop()
        self.at[node] = self._emit(with_(step, positions=positions, offset=offset))
        return True

    def _learned(self, node: Any) -> tuple[Weight, int]:
        """A table of positions: the parameter itself where the position is its row, up to an offset."""
        source = node
        while is_move(source):
            source = source.args[0]
        if is_call(source, aten.embedding.default) and source.args[0].op == "placeholder":
            rows = self.tables.table(source.args[1]).flatten()
            offset = int(rows[0])
            if torch.equal(rows, torch.arange(offset, offset + len(rows))):
                return Weight(self.parts.stored(source.args[0])), offset
        return Weight(self.tables.table(node).reshape(self.tables.max_length, -1).float()), 0

    def _product(self, node: Any) -> bool:
        if node.kwargs:
            return False
        one, two = node.args
        if not isinstance(one, fx.Node) or self.tables.kinds[one] != LIVE:
            one, two = two, one
        number = self.parts.number(two)
        if number is not None and isinstance(one, fx.Node):
            if node.target is aten.div.Tensor:
                if one is not node.args[0]:
                    return False
                number = 1.0 / number
            return self._scaled(node, one, number)
        both = isinstance(two, fx.Node) and self.tables.kinds[two] == LIVE and node.target is aten.mul.Tensor
        if not both or width(one) != width(node) or width(two) != width(node):
            return False
        a, b = self._row(one), self._row(two)
        self.at[node] = self._emit(Combine(self._new(width(node)), a, b, product=True))
        return True

    def _scaled(self, node: fx.Node, x: fx.Node, number: float) -> bool:
        step = self._embedded(x)
        if step is not None and step.positions is None:
            self.steps.pop()
            self.at[node] = self._emit(with_(step, scale=step.scale * number))
        else:
            self.at[node] = self._emit(Combine(self._new(width(node)), self._row(x), scale=number))
        return True

    def _attention(self, node: Any) -> bool:
        plan = self.heads.plans[node]
        keys = plan.caches[0]
        first_reader = min(keys.users) is node or all(u not in self.at for u in keys.users)
        q = self._row(plan.nodes["q"])
        k, v = (self._row(plan.nodes[name]) if first_reader else None for name in ("k", "v"))
        self.at[node] = self._emit(self.heads.attend(node, self._new(width(node)), q, k, v))
        return True


def _named(node: fx.Node) -> str:
    target: Any = node.target
    return target.name if isinstance(target, Op) else str(target).removeprefix("aten.").split(".")[0]
