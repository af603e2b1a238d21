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
from taut.ops.rope import rope
from taut.ops.rope_append import rope_append
from taut.rewrite import STEP
from taut.rewrites._fused import options
from taut.rewrites.decode_attention import decode_attention
from taut.runtime.gathers import without_gathers
from taut.runtime.pieces import Gather, Piece, width
from taut.runtime.step import TOKEN
from taut.runtime.steps import (
    Attend,
    Combine,
    Embed,
    Glu,
    Linear,
    Norm,
    Normalize,
    Program,
    Rotary,
    Step,
    Torch,
    View,
    Weight,
)
from taut.runtime.tables import BY_POSITION, CONSTANT, LIVE, Tables
from taut.values import Original, Stacked, reader

aten = torch.ops.aten
PRODUCTS = (linear, fused_linear, fused_glu, cache_attention, rms_norm, layer_norm)


class CannotLower(Exception):
    """The step touches its caches, or mixes rows, in a way that is not known; the message says where."""


@dataclass(frozen=True, eq=False)
class Picked:
    """Columns of a value that are no interval; a row of them is made when it is needed."""

    source: View
    index: Tensor


Convert = Callable[[Tensor], Weight]
"""How a matrix is kept that was read from the checkpoint."""


def lower(graph: Graph, convert: Convert = Weight) -> Program:
    """The program of a prepared step graph. Raises CannotLower with the reason."""
    return Lowering(graph, convert).program()


class Lowering:
    def __init__(self, graph: Graph, convert: Convert) -> None:
        self.graph, self.tables, self.convert = graph, Tables(graph), convert
        self.steps: list[Step] = []
        self.widths: dict[str, int] = {}
        self.at: dict[fx.Node, Any] = {}
        self.made_by: dict[str, Step] = {}
        self.pending: list[fx.Node] = []
        self.heads: dict[fx.Node, Attention] = {}
        self.absorbed: set[fx.Node] = set()
        self.memo: dict[Any, Any] = {}
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
        for node in self.graph.calls(cache_attention):
            self._plan_attention(node)
        self._absorb()
        for node in self.graph.nodes:
            if node.op == "call_function" and self.tables.kinds[node] == LIVE and node not in self.absorbed:
                self._node(node)
        result: Any = self.graph.output.args[0]
        logits = self._row(result[0])
        if (logits.start, logits.stop) != (0, self.widths[logits.buffer]):
            logits = self._emit(Combine(self._new(logits.stop - logits.start), logits))
        caches = self._caches()
        program = Program(tuple(self.steps), self.widths, logits.buffer, caches, self.tables.max_length)
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
            return call(node, lambda n: index if n is node.args[0] else self._constant(n), torch.device("cpu"))
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
        raise CannotLower("the model does more with its token than to embed it")

    def _gathered(self, picked: Picked) -> View:
        out = self._new(len(picked.index))
        return self._emit(Torch((out,), (picked.source,), Gather(picked.index), "its columns are no interval"), out)

    def _flush(self) -> None:
        """Make one piece of the nodes left to torch so far."""
        nodes, self.pending = self._with_movements(self.pending), []
        inside = set(nodes)
        outside = [n for node in nodes for n in node.all_input_nodes if n not in inside]
        constants = {n: self._constant(n) for n in outside if self.tables.kinds[n] == CONSTANT}
        inputs = tuple(dict.fromkeys(n for n in outside if self.tables.kinds[n] != CONSTANT))
        views = tuple(self._row(n) for n in inputs)
        outs = tuple(n for n in nodes if isinstance(n.meta["val"], Tensor) and any(u not in inside for u in n.users))
        names = tuple(self._new(width(n)) for n in outs)
        where = nodes[0].meta.get("where") or "the model"
        why = f"no word for {', '.join(dict.fromkeys(_named(n) for n in nodes))} in {where}"
        self._emit(Torch(names, views, Piece(tuple(nodes), inputs, outs, constants), why), names[0])
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
        self.widths[name] = size
        return name

    def _emit(self, step: Step, out: str | None = None) -> View:
        name = out or step.out  # type: ignore[union-attr]
        self.steps.append(step)
        self.made_by[name] = step
        return View(name, 0, self.widths[name])

    def _constant(self, node: fx.Node) -> Tensor:
        if node not in self.memo:
            self.memo[node] = self.tables.constant(node)
        return self.memo[node]

    def _weight(self, node: fx.Node) -> Weight:
        """A matrix as it is stored: what only moves a parameter keeps its dtype."""
        if node not in self.memo:
            self.memo[node] = self.convert(self._stored(node))
        return self.memo[node]

    def _stored(self, node: Any) -> Tensor:
        if node.op == "placeholder" and node.meta["kind"] == "parameter":
            return stored(self.graph, node.meta["tensor"])
        if is_move(node) and self.tables.kinds[node.args[0]] == CONSTANT:
            return move(node, self._stored(node.args[0])).contiguous()  # type: ignore[union-attr]
        return self._constant(node)

    def _vector(self, node: Any) -> Tensor | None:
        return None if node is None else self._constant(node).flatten().float()

    def _norm_of(self, given: dict[str, Any]) -> Norm | None:
        if given.get("eps") is None:
            return None
        gain, shift = self._vector(given.get("gain")), self._vector(given.get("shift"))
        return Norm(float(given["eps"]), gain, shift, bool(given.get("centred", False)))

    # Words

    def _embedding(self, node: Any) -> bool:
        table, index = node.args[:2]
        if self.tables.kinds[table] != CONSTANT or not self._is_token(index) or len(node.args) > 3:
            return False
        self.at[node] = self._emit(Embed(self._new(width(node)), self._weight(table)))
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
                weight=self._weight(weight),
                bias=self._vector(given.get("bias")),
                norm=self._norm_of(given),
                activation=given.get("act"),
                scale=given.get("factor", 1.0),
                softcap=given.get("softcap"),
                residual=None if residual is None else self._row(residual),
                out=self._new(width(node)),
            )
        )
        return True

    def _glu(self, node: Any) -> bool:
        x, gate, up, act = node.args
        given = dict(node.kwargs)
        if width(x) != shape(x)[-1]:
            return False
        biases = self._vector(given.get("gate_bias")), self._vector(given.get("up_bias"))
        row, norm = self._row(x), self._norm_of(given)
        step = Glu(self._new(width(node)), row, self._weight(gate), self._weight(up), act, *biases, norm)
        self.at[node] = self._emit(step)
        return True

    def _norm(self, node: Any) -> bool:
        x, norm = node.args[0], self._own_norm(node)
        if norm is None or width(x) != shape(x)[-1]:
            return False
        self.at[node] = self._emit(Normalize(x=self._row(x), norm=norm, out=self._new(width(node))))
        return True

    def _own_norm(self, node: Any) -> Norm | None:
        centred = node.target is layer_norm
        names = ("gain", "bias", "eps") if centred else ("gain", "eps")
        given: dict[str, Any] = (
            {"eps": 1e-5 if centred else 1e-6} | dict(zip(names, node.args[1:], strict=False)) | dict(node.kwargs)
        )
        vectors = [given.get("gain"), given.get("bias")]
        if not isinstance(given["eps"], float | int) or any(v is not None and not self._fits(v, node) for v in vectors):
            return None
        return Norm(float(given["eps"]), self._vector(vectors[0]), self._vector(vectors[1]), centred)

    def _fits(self, vector: fx.Node, node: fx.Node) -> bool:
        return self.tables.kinds[vector] == CONSTANT and width(vector) == shape(node)[-1]

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
                return Weight(self._stored(source.args[0])), offset
        return Weight(self.tables.table(node).reshape(self.tables.max_length, -1).float()), 0

    def _product(self, node: Any) -> bool:
        if node.kwargs:
            return False
        one, two = node.args
        if not isinstance(one, fx.Node) or self.tables.kinds[one] != LIVE:
            one, two = two, one
        number = self._number(two)
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

    def _number(self, value: Any) -> float | None:
        if isinstance(value, int | float):
            return float(value)
        if isinstance(value, fx.Node) and self.tables.kinds[value] == CONSTANT and width(value) == 1:
            return float(self._constant(value))
        return None

    def _scaled(self, node: fx.Node, x: fx.Node, number: float) -> bool:
        step = self._embedded(x)
        if step is not None and step.positions is None:
            self.steps.pop()
            self.at[node] = self._emit(with_(step, scale=step.scale * number))
        else:
            self.at[node] = self._emit(Combine(self._new(width(node)), self._row(x), scale=number))
        return True

    # Attention

    def _plan_attention(self, node: Any) -> None:
        """What of the heads' norms and turns goes into the attention's own step."""
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
        self.heads[node] = plan

    def _cached(self, node: Any) -> tuple[int, Any, Any]:
        """(layer, how it is turned, what is appended) of appended keys or values."""
        layer = int(node.args[0].meta["tensor"].split(".")[1])
        if node.target is rope_append:
            _, x, _, *turn = node.args
            return layer, tuple(turn), x
        return layer, None, node.args[3]

    def _turned(self, node: Any) -> tuple[Any, Any]:
        inner = self._same_row(node)
        return (tuple(inner.args[1:]), inner.args[0]) if is_call(inner, rope) else (None, node)

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
        norm = self._own_norm(inner) if shape(inner)[-1] == shape(node)[-1] else None
        return (None, node) if norm is None else (norm, inner.args[0])

    def _rotary(self, cos: Any, sin: Any, interleaved: bool = False) -> Rotary:
        if (cos, sin, interleaved) not in self.memo:
            tables = [self.tables.table(node).reshape(self.tables.max_length, -1).float() for node in (cos, sin)]
            half = tables[0].shape[1] // 2
            parts = [(t[:, ::2], t[:, 1::2]) if interleaved else (t[:, :half], t[:, half:]) for t in tables]
            if any(not torch.equal(one, two) for one, two in parts):
                raise CannotLower("the two features of a pair are turned by different angles")
            made = Rotary(parts[0][0].contiguous(), parts[1][0].contiguous(), interleaved)
            known = (known for known in self.memo.values() if isinstance(known, Rotary) and _same(known, made))
            self.memo[cos, sin, interleaved] = next(known, made)
        return self.memo[cos, sin, interleaved]

    def _absorb(self) -> None:
        """Nodes that only the attentions' own steps read are not lowered on their own."""
        ends: set[fx.Node] = set(self.heads)
        kept = {node for plan in self.heads.values() for node in plan.nodes.values()}
        for node in reversed(list(self.graph.nodes)):
            inside = bool(node.users) and all(user in ends or user in self.absorbed for user in node.users)
            if node.op == "call_function" and inside and node not in kept:
                self.absorbed.add(node)

    def _attention(self, node: Any) -> bool:
        plan = self.heads[node]
        given = dict(zip(("first", "scale", "softcap", "sinks", "alibi"), node.args[4:], strict=False)) | dict(
            node.kwargs
        )
        keys, values = plan.caches
        first_reader = min(keys.users) is node or all(u not in self.at for u in keys.users)
        new = [self._row(plan.nodes[name]) if first_reader else None for name in ("k", "v")]
        d, dv = shape(keys)[3], shape(values)[3]
        scale = given.get("scale")
        first = self.graph.tensors[given["first"].meta["tensor"]] if given.get("first") is not None else None
        step = Attend(
            out=self._new(width(node)),
            q=self._row(plan.nodes["q"]),
            k=new[0],
            v=new[1],
            layer=plan.layer,
            heads=shape(node)[1],
            kv_heads=shape(keys)[1],
            d=d,
            dv=dv,
            scale=d**-0.5 if scale is None else float(scale),
            rotary=plan.rotary,
            q_norm=plan.q_norm,
            k_norm=plan.k_norm if first_reader else None,
            softcap=given.get("softcap"),
            first=first if first is not None and bool(first.any()) else None,
            alibi=self._vector(given.get("alibi")),
            sinks=self._vector(given.get("sinks")),
        )
        self.at[node] = self._emit(step)
        return True


@dataclass(frozen=True, eq=False)
class Attention:
    """An attention's parts: the rows it takes, and what is done to them in its own step."""

    layer: int
    nodes: dict[str, Any]
    rotary: Rotary | None
    q_norm: Norm | None
    k_norm: Norm | None
    caches: tuple[fx.Node, fx.Node]


def stored(graph: Graph, name: str) -> Tensor:
    """A parameter in the dtype in which it is stored; several stacked are put together as they are."""
    value = graph.values[name]
    if isinstance(value, Stacked) and all(isinstance(part, Original) for part in value.parts):
        read = graph.read or reader(graph.tensors)
        return torch.cat([read(part.name, None) for part in value.parts if isinstance(part, Original)])
    return graph.evaluate(name, None)


def _same(one: Rotary, two: Rotary) -> bool:
    return one.interleaved == two.interleaved and torch.equal(one.cos, two.cos) and torch.equal(one.sin, two.sin)


def _named(node: fx.Node) -> str:
    target: Any = node.target
    return target.name if isinstance(target, Op) else str(target).removeprefix("aten.").split(".")[0]
