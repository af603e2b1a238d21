"""A graph for people: a layer in about a dozen lines.

Movements, casts and what is computed from parameters alone stand inside their readers. A name is followed by what was
moved: `x.slice(2,0,8)[2,4,13,8]` is a slice of x, seen in another shape. At the end of a line stand dtype and shape,
then the module path where it changes. Repeated layers that are alike are printed once.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.contraction import name_of
from taut.facts.moves import MOVES, is_move
from taut.graph import Graph, is_getitem, shape
from taut.lift._match import is_constant
from taut.op import Op

aten = torch.ops.aten
Columns = Mapping[str, Mapping[fx.Node, str]]
"""What to say about nodes, under the heading of each column."""

SELECTS: dict[Any, str] = {
    aten.slice.Tensor: "slice",
    aten.select.int: "select",
    aten.index.Tensor: "index",
    aten.index_select.default: "index_select",
    aten.gather.default: "gather",
    aten.repeat.default: "repeat",
    aten.repeat_interleave.self_int: "repeat",
    aten.flip.default: "flip",
    aten.roll.default: "roll",
}
SHORT = {"float": "f", "bfloat": "bf", "int": "i", "uint": "u", "complex": "c", "bool": "bool"}
END = 2**62
MARK = "\0"
"""Stands around the names of other nodes until a line is done."""

HIDDEN = ("pin_memory", "device", "layout", "memory_format")
LAYER = re.compile(r"^(.*?)\.(\d+)(?:\.|$)")


def text(graph: Graph, facts: Columns | None = None) -> str:
    """The graph, one line a call, with a column for each entry of `facts`; see `columns`."""
    facts = facts or {}
    printer = _Printer(graph)
    lines = [printer.line(node, facts) for node in graph.nodes if printer.is_shown(node)]
    widest = min(120, max((len(line.call) for line in lines), default=0))
    widths = {name: max([len(name), *map(len, said.values())]) for name, said in facts.items()}
    head = " " * (widest + 2) + "  ".join(name.ljust(widths[name]) for name in facts)
    body, where = [head.rstrip()] if facts else [], ""
    for item in _folded(lines):
        if isinstance(item, str):
            body.append(item)
            continue
        said = "".join("  " + one.ljust(width) for one, width in zip(item.facts, widths.values(), strict=True))
        path = (item.where or ".") if item.where != where else ""
        body.append(f"{item.call:<{widest}}{said}  {item.shape:<20}  {path}".rstrip())
        where = item.where
    return "\n".join(body)


def columns(graph: Graph) -> Columns:
    """The facts that `text` can print.

    Where the mean along the features is zero, how many read each value, the power of a norm's scalar that a value
    carries where it could be deferred, and where that scalar must be put in at the latest.
    """
    from taut.facts.degree import NORMS, reach
    from taut.facts.mean import zero_mean

    printer = _Printer(graph)
    zero = zero_mean(graph)
    degree: dict[fx.Node, str] = {}
    frontier: dict[fx.Node, str] = {}
    for norm in graph.calls(*NORMS):
        found = reach(graph, norm)
        degree |= {node: f"s^{scaled.degree}" for node, scaled in found.scaled.items() if scaled.degree}
        frontier |= {edge.user: f"needs {edge.source.name} * s^{edge.degree}" for edge in found.frontier}
    return {
        "scale": degree,
        "frontier": frontier,
        "mean": {node: "zero" for node, axis in zero.items() if axis == len(shape(node)) - 1},
        "readers": {
            node: str(printer.readers(node)) for node in graph.nodes if node.op != "output" and printer.is_shown(node)
        },
    }


@dataclass(frozen=True)
class _Line:
    """One call as text; `signature` is the call with other nodes' names left out, `sources` are those names."""

    name: str
    call: str
    shape: str
    where: str
    facts: tuple[str, ...]
    signature: tuple = field(compare=False)
    sources: tuple[str, ...] = field(compare=False)


class _Printer:
    def __init__(self, graph: Graph) -> None:
        self.graph = graph
        self.known: dict[fx.Node, bool] = {}

    def is_inlined(self, node: fx.Node) -> bool:
        if node.op != "call_function" or self.returns_several(node):
            return node.op == "call_function" and node.target in MOVES
        return is_move(node) or is_constant(node, self.known)

    def returns_several(self, node: fx.Node) -> bool:
        return isinstance(node.meta.get("val"), list | tuple)

    def is_shown(self, node: fx.Node) -> bool:
        return node.op == "output" or (node.op == "call_function" and not self.is_inlined(node))

    def readers(self, node: fx.Node) -> int:
        """The shown nodes that read a value, past what is inlined."""
        found, todo = set(), [node]
        while todo:
            for user in todo.pop().users:
                if self.is_shown(user):
                    found.add(user)
                else:
                    todo.append(user)
        return len(found)

    def line(self, node: fx.Node, facts: Columns) -> _Line:
        sources: list[str] = []
        where = self.where(node)
        if node.op == "output":
            results: Any = node.args[0]
            named = zip(self.graph.outputs, results, strict=True)
            returned = ", ".join(f"{name}={self.show(value, sources)}" for name, value in named)
            call = f"return {returned}"
        else:
            call = self.called(node, sources)
        signature = (_neutral(call, sources), LAYER.sub(r"\1.*.", where + "."), _type_of(node))
        call = call.replace(MARK, "")
        call = call if node.op == "output" else f"{node.name} = {call}"
        said = tuple(column.get(node, "") for column in facts.values())
        return _Line(node.name, call, _type_of(node), where, said, (*signature, said), tuple(sources))

    def where(self, node: fx.Node) -> str:
        """The module path, without the part that a parameter's name repeats."""
        where = node.meta.get("where", "")
        parameters = [arg.meta["tensor"] for arg in node.all_input_nodes if arg.op == "placeholder"]
        owned = any(name.startswith(where + ".") and "." not in name[len(where) + 1 :] for name in parameters)
        return where.rpartition(".")[0] if owned else where

    def called(self, node: fx.Node, sources: list[str]) -> str:
        args, options = _split(node)
        shown = [self.show(arg, sources) for arg in args]
        shown += [f"{name}={self.show(value, sources)}" for name, value in options.items()]
        return f"{name_of(node).split(' in ')[0]}({', '.join(shown)})"

    def show(self, value: Any, sources: list[str]) -> str:
        if isinstance(value, list | tuple):
            return f"[{', '.join(self.show(v, sources) for v in value)}]"
        if not isinstance(value, fx.Node):
            return str(value).removeprefix("torch.")
        if value.op == "placeholder":
            return self.placeholder(value, sources)
        if is_move(value):
            return self.moved(value, sources)
        if self.is_inlined(value):
            return self.called(value, sources)
        sources.append(value.name)
        return f"{MARK}{value.name}{MARK}"

    def placeholder(self, node: fx.Node, sources: list[str]) -> str:
        name = node.meta["tensor"]
        return ".".join(name.split(".")[-2:]) if node.meta["kind"] != "input" else name

    def moved(self, node: fx.Node, sources: list[str]) -> str:
        """The source of a chain of movements, what was selected of it, and its shape if that differs."""
        chain: list[fx.Node] = []
        source: Any = node
        while is_move(source):
            chain.append(source)
            source = source.args[0]
        picked, size = "", shape(source)
        for step in reversed(chain):
            if is_getitem(step):
                picked, size = f"{picked}.{step.args[1]}", shape(step)
            elif step.target in SELECTS:
                picked += f".{SELECTS[step.target]}({', '.join(self.show(a, sources) for a in _bounds(step))})"
                size = shape(step)
        return self.show(source, sources) + picked + (f"[{_sizes(shape(node))}]" if shape(node) != size else "")


def _bounds(step: fx.Node) -> list[Any]:
    return ["end" if isinstance(arg, int) and arg > END else arg for arg in step.args[1:]]


def _split(node: fx.Node) -> tuple[list[Any], dict[str, Any]]:
    """The arguments, and those with a name to print: of an op what is no node, and no default."""
    options = {name: value for name, value in node.kwargs.items() if name not in HIDDEN}
    if not isinstance(node.target, Op):
        return list(node.args), options
    default = {one.name: one.default for one in inspect.signature(node.target.reference).parameters.values()}
    given = dict(zip(default, node.args, strict=False)) | options
    told = {name: value for name, value in given.items() if isinstance(value, fx.Node) or value != default[name]}
    in_order = [
        name for name, first in zip(told, default, strict=False) if name == first and isinstance(told[name], fx.Node)
    ]
    return [told[name] for name in in_order], {name: told[name] for name in told if name not in in_order}


def _sizes(size: tuple[int, ...]) -> str:
    return ",".join(map(str, size))


def _type_of(node: fx.Node) -> str:
    value = node.meta.get("val")
    if isinstance(value, list | tuple):
        return f"{len(value)} tensors"
    if not isinstance(value, Tensor):
        return ""
    kind = re.sub(r"^[a-z]+", lambda m: SHORT.get(m[0], m[0]), str(value.dtype).removeprefix("torch."))
    return f"{kind}[{_sizes(tuple(value.shape))}]"


def _neutral(call: str, sources: list[str]) -> str:
    """A call with its sources numbered instead of named."""
    for i, name in enumerate(dict.fromkeys(sources)):
        call = call.replace(f"{MARK}{name}{MARK}", f"{MARK}{i}{MARK}")
    return call


def _folded(lines: list[_Line]) -> list[_Line | str]:
    """The lines, with runs of layers that are alike reduced to their first."""
    blocks = _blocks(lines)
    shown: list[_Line | str] = []
    at = 0
    while at < len(blocks):
        layer, block = blocks[at]
        end = at + 1
        while layer and end < len(blocks) and _alike(blocks, at, end):
            end += 1
        shown += block
        if end > at + 1:
            first, last = blocks[at + 1][0], blocks[end - 1]
            many = f"{first} is" if end == at + 2 else f"{first} to {last[0]} are"
            shown.append(f"    {many} like {layer}; the last value is {last[1][-1].name}")
        at = end
    return shown


def _blocks(lines: list[_Line]) -> list[tuple[str, list[_Line]]]:
    """Consecutive lines of one numbered layer, under its path; lines of no layer under an empty one."""
    blocks: list[tuple[str, list[_Line]]] = []
    for line in lines:
        found = LAYER.match(line.where)
        layer = f"{found[1]}.{found[2]}" if found else ""
        if not blocks or blocks[-1][0] != layer:
            blocks.append((layer, []))
        blocks[-1][1].append(line)
    return blocks


def _alike(blocks: list[tuple[str, list[_Line]]], first: int, other: int) -> bool:
    """Whether two layers make the same calls on the same values, each on what the layer before it handed on."""
    one, two = blocks[first], blocks[other]
    same_stack = one[0].rpartition(".")[0] == two[0].rpartition(".")[0]
    if not same_stack or len(one[1]) != len(two[1]):
        return False
    before = {line.name: i for i, line in enumerate(blocks[other - 1][1])}
    handed: dict[str, str] = {}
    paired: dict[str, str] = {}
    for a, b in zip(one[1], two[1], strict=True):
        if a.signature != b.signature or len(a.sources) != len(b.sources):
            return False
        for x, y in zip(a.sources, b.sources, strict=True):
            expected = paired.get(x) or (x if y not in before else handed.setdefault(x, y))
            if y != expected:
                return False
        paired[a.name] = b.name
    return True
