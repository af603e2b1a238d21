"""What a graph must compute and move, node by node, and the least time that a machine needs for it.

Counted from shapes alone. A graph is traced at one batch and length; a `Workload` says at which ones it is counted:
the axes that are the traced batch, length, or their product are given other sizes, parameters stay as they are. Only
what an op must do is counted (`Op.work`; for plain ATen: products, and every other value read and written once).
Views are free, and so is what depends on neither inputs nor their values: it can be computed ahead.

A sliding window that a graph keeps in a mask is not seen, and a loop over tokens that the trace unrolled is counted at
the traced length.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.moves import GATHERS, MOVES
from taut.graph import Graph
from taut.lift._match import CASTS
from taut.machine import Machine
from taut.op import Op, Work, nbytes
from taut.ops.attention import attention
from taut.ops.dequantize import dequantize
from taut.values import Filled

aten = torch.ops.aten
FUSED_ATTENTION = aten.scaled_dot_product_attention.default
PRODUCTS = {aten.matmul.default, aten.mm.default, aten.bmm.default, aten.addmm.default, aten.baddbmm.default}
CONVOLUTIONS = {aten.conv1d.default, aten.conv2d.default, aten.conv3d.default, aten.convolution.default}
LOOKUPS = GATHERS | {aten.embedding.default}
COPIES = {aten.repeat.default, aten.repeat_interleave.self_int, aten.flip.default, aten.roll.default}
FREE = (MOVES - GATHERS - COPIES) | CASTS


@dataclass(frozen=True)
class Workload:
    """A forward pass over `batch` sequences of `length` new tokens, each behind `context` tokens that a cache holds.

    `length` None keeps the traced one: for models whose inputs are no tokens.
    """

    name: str
    batch: int = 1
    length: int | None = None
    context: int = 0


PREFILL = Workload("prefill", length=512)
DECODE = Workload("decode", length=1, context=511)


@dataclass(frozen=True)
class Item:
    """The least work of one call. `held` of its bytes are parameters and caches, which no fusion saves."""

    kind: str
    name: str
    where: str
    work: Work
    held: float
    dtype: str

    def seconds(self, machine: Machine) -> float:
        return least_time(machine, self.work, self.dtype)

    def computing(self, machine: Machine) -> float:
        """Seconds for the FLOPs alone."""
        return self.work.flops / _rate(machine, self.dtype)


@dataclass(frozen=True)
class Kind:
    """All calls of one op: how many, their work, their least time in seconds, and their share of the sum."""

    kind: str
    calls: int
    work: Work
    seconds: float
    share: float


@dataclass(frozen=True)
class Cost:
    """The calls of a graph at a workload; `ends` are the bytes of what the graph takes and returns."""

    workload: Workload
    items: tuple[Item, ...]
    ends: float

    @property
    def title(self) -> str:
        """What is counted, in words."""
        step = self.workload
        if step.name == "decode":
            return "decode step"
        return step.name if step.length is None else f"{step.name} of {step.length}"

    @cached_property
    def work(self) -> Work:
        """FLOPs and bytes when every call reads its inputs from memory and writes its outputs there."""
        return sum((item.work for item in self.items), Work(0, 0))

    @cached_property
    def fused(self) -> Work:
        """The same FLOPs, with parameters and caches read once and nothing in between written."""
        return Work(self.work.flops, sum(item.held for item in self.items) + self.ends)

    def one_by_one(self, machine: Machine) -> float:
        """Seconds when each call takes its own least time."""
        return sum(item.seconds(machine) for item in self.items)

    def floor(self, machine: Machine) -> float:
        """Seconds that no fusion can go below: what slack is measured against."""
        computing = sum(item.computing(machine) for item in self.items)
        return max(computing, self.fused.bytes / machine.bandwidths["memory"].value)

    def kinds(self, machine: Machine) -> list[Kind]:
        """The calls by op, those that need most time first."""
        groups: dict[str, list[Item]] = {}
        for item in self.items:
            groups.setdefault(item.kind, []).append(item)
        whole = self.one_by_one(machine)
        rows = []
        for kind, items in groups.items():
            seconds = sum(item.seconds(machine) for item in items)
            work = sum((item.work for item in items), Work(0, 0))
            rows.append(Kind(kind, len(items), work, seconds, seconds / whole if whole else 0.0))
        return sorted(rows, key=lambda row: -row.seconds)

    def as_dict(self, machine: Machine | None, ops: bool = False) -> dict[str, Any]:
        """For JSON: work, and on a machine the floor, the sum of the calls' own floors, and the kinds of calls."""
        asked = {"workload": self.workload.name, "batch": self.workload.batch, "length": self.workload.length}
        shown = asked | {"context": self.workload.context, "calls": len(self.items), "flops": self.work.flops}
        shown |= {"bytes": self.work.bytes, "fused_bytes": self.fused.bytes}
        if machine is not None:
            rows = [asdict(kind) for kind in self.kinds(machine)]
            shown |= {"floor_s": self.floor(machine), "one_by_one_s": self.one_by_one(machine), "kinds": rows}
        if ops:
            timed = [(item, {} if machine is None else {"seconds": item.seconds(machine)}) for item in self.items]
            shown["ops"] = [asdict(item) | extra for item, extra in timed]
        return shown


def least_time(machine: Machine, work: Work, dtype: str) -> float:
    """max(FLOPs / peak, bytes / bandwidth), in seconds."""
    return max(work.flops / _rate(machine, dtype), work.bytes / machine.bandwidths["memory"].value)


def _rate(machine: Machine, dtype: str) -> float:
    """FLOP/s in a dtype; numbers can be widened and computed in float32 where a machine is slow at a dtype."""
    own, wide = machine.peaks.get(dtype), machine.peaks["float32"].value
    return own.value if own and (dtype == "float64" or own.value > wide) else wide


def cost(graph: Graph, workload: Workload, dtype: torch.dtype | None = None, decodes: bool = False) -> Cost:
    """Count a graph, lifted or rewritten, at a workload.

    `dtype` is that of float32 values (a graph traced from shapes alone is in float32 whatever the checkpoint holds).
    `decodes` says that the model generates: no token looks at a later one, whatever its mask holds.
    """
    return _Count(graph, workload, dtype, decodes).count()


def costs(graph: Graph, step: bool, dtype: torch.dtype | None = None) -> list[Cost]:
    """What a graph costs at the workloads that suit it; `step` says that the model generates, see `decodes`."""
    return [cost(graph, workload, dtype, step) for workload in workloads(graph, step)]


def workloads(graph: Graph, decodes: bool) -> list[Workload]:
    """What to count a graph at: a prefill and a decode step, or one forward pass where the model does not generate."""
    if _lengths(graph):
        return [DECODE, PREFILL] if decodes else [Workload("forward", length=512)]
    return [Workload("forward")]


def decodes(model: Any) -> bool:
    """Whether a model generates token by token from its own output."""
    asked = getattr(model, "can_generate", None)
    return bool(asked and asked()) and not getattr(model.config, "is_encoder_decoder", False)


def _inputs(graph: Graph) -> list[Tensor]:
    return [node.meta["val"] for node in graph.placeholders("input").values()]


def _lengths(graph: Graph) -> set[int]:
    """The lengths of the token inputs; an encoder and a decoder have one each."""
    return {t.shape[1] for t in _inputs(graph) if t.ndim == 2 and not t.is_floating_point()}


@dataclass
class _Count:
    graph: Graph
    workload: Workload
    dtype: torch.dtype | None
    decodes: bool
    ahead: dict[fx.Node, bool] = field(default_factory=dict)
    parameters: dict[fx.Node, bool] = field(default_factory=dict)

    def __post_init__(self) -> None:
        sizes = [t for t in _inputs(self.graph) if t.ndim]
        self.batch = sizes[0].shape[0] if sizes else 1
        self.lengths = _lengths(self.graph) if self.workload.length is not None else set()
        self.tokens = self.batch * max(self.lengths, default=0)

    def count(self) -> Cost:
        items = []
        for node in self.graph.nodes:
            if node.op == "call_function" and node.target not in FREE and not self.computed_ahead(node):
                items.append(self.item(node))
        results: list[fx.Node] = []
        fx.map_arg(self.graph.output.args, results.append)
        taken = [node for node in self.graph.placeholders("input").values() if node.users]
        return Cost(self.workload, tuple(items), sum(self.bytes_of(node) for node in {*results, *taken}))

    def computed_ahead(self, node: fx.Node) -> bool:
        if node not in self.ahead:
            if node.op == "placeholder":
                self.ahead[node] = node.meta["kind"] != "input"
            else:
                self.ahead[node] = all(self.computed_ahead(source) for source in node.all_input_nodes)
        return self.ahead[node]

    def item(self, node: fx.Node) -> Item:
        work = self.work(node)
        passed = sum(self.bytes_of(n) for n in node.all_input_nodes if not self.computed_ahead(n))
        held = max(0.0, work.bytes - passed - self.bytes_of(node))
        floats = [t.dtype for t in _tensors(self.value(node)) if t.is_floating_point()]
        dtype = str(floats[0] if floats else torch.float32).removeprefix("torch.")
        return Item(kind_of(node), node.name, node.meta.get("where", ""), work, held, dtype)

    def work(self, node: fx.Node) -> Work:
        target: Any = node.target
        if target is attention or target is FUSED_ATTENTION:
            return self.attention(node)
        if isinstance(target, Op) and target.work is not None:
            given = lambda n: None if self.is_idle(n) else self.value(n)  # noqa: E731
            args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), given)
            return target.work(*args, **kwargs)
        written, read = self.bytes_of(node), sum(self.bytes_of(n) for n in node.all_input_nodes)
        if target in LOOKUPS:
            table: Any = node.args[0]
            return Work(0, 2 * written + read - self.bytes_of(table))
        return Work(self.flops(node), read + written)

    def attention(self, node: fx.Node) -> Work:
        q, k, v = (self.value(n, keys=i > 0) for i, n in enumerate(node.args[:3]))  # type: ignore[arg-type]
        rest, options = fx.map_arg((node.args[3:], dict(node.kwargs)), self.value)
        if node.target is FUSED_ATTENTION:
            rest, options = rest[:1], {}
        names = ("mask", "scale", "causal", "softcap", "window", "sinks", "alibi")
        given = dict(zip(names, rest, strict=False)) | options
        if self.decodes and q.shape[2] <= k.shape[2]:
            given["causal"] = True
        assert attention.work is not None
        return attention.work(q, k, v, **given)

    def flops(self, node: fx.Node) -> float:
        """Two for each product of numbers; one for each element of anything else, before or after it is reduced."""
        out = sum(t.numel() for t in _tensors(self.value(node)))
        if node.target in PRODUCTS:
            factor: Any = [arg for arg in node.args if isinstance(arg, fx.Node)][-1]
            inner = self.value(factor, keys=not self.is_parameter(factor))
            return 2 * out * inner.shape[-2 if inner.ndim > 1 else -1]
        if node.target in CONVOLUTIONS:
            weight: Any = node.args[1]
            return 2 * out * math.prod(self.value(weight).shape[1:])
        if node.target is aten.einsum.default:
            return self.einsum(node)
        return max([out, *(t.numel() for n in node.all_input_nodes for t in _tensors(self.value(n)))])

    def einsum(self, node: fx.Node) -> float:
        equation, operands = node.args[:2]
        terms = str(equation).replace(" ", "").split("->")[0].split(",")
        sizes: dict[str, int] = {}
        for term, operand in zip(terms, operands, strict=True):  # type: ignore[arg-type]
            for letter, size in zip(reversed(term), reversed(self.value(operand).shape), strict=False):
                sizes[letter] = max(size, sizes.get(letter, 1))
        return 2 * math.prod(sizes.values())

    def is_parameter(self, node: fx.Node) -> bool:
        """Whether a value is computed from parameters alone: its shape does not follow the inputs'."""
        if node not in self.parameters:
            sources = node.all_input_nodes
            own = node.op == "placeholder" and node.meta["kind"] == "parameter"
            self.parameters[node] = own or (bool(sources) and all(self.is_parameter(n) for n in sources))
        return self.parameters[node]

    def is_idle(self, node: fx.Node) -> bool:
        """Whether a vector is known to be one number: a gain or a bias that was folded away is not read."""
        if node.op == "placeholder":
            return isinstance(self.graph.values.get(node.meta["tensor"]), Filled) and node.meta["val"].ndim == 1
        return bool(node.all_input_nodes) and all(self.is_idle(n) for n in node.all_input_nodes)

    def value(self, node: fx.Node, keys: bool = False) -> Any:
        """A node's meta value at the workload; with `keys` along all tokens that it may look at, not the new ones."""
        fixed = self.is_parameter(node)
        made = _as_kept(node) if fixed and node.target is dequantize else node.meta.get("val")
        if isinstance(made, list | tuple):
            return type(made)(self.scaled(v, fixed, keys) for v in made)
        return self.scaled(made, fixed, keys)

    def scaled(self, value: Any, fixed: bool, keys: bool) -> Any:
        if not isinstance(value, Tensor):
            return value
        dtype = self.dtype if self.dtype is not None and value.dtype is torch.float32 else value.dtype
        sizes = list(value.shape) if fixed else self.sizes(list(value.shape), keys)
        stored = [1 if stride == 0 else size for size, stride in zip(sizes, value.stride(), strict=True)]
        return torch.empty(stored, dtype=dtype, device="meta").expand(sizes)

    def sizes(self, traced: list[int], keys: bool) -> list[int]:
        """The first axis that is the batch, the first that is the length, and a second one: what is looked at."""
        length = self.workload.length or 1
        every = self.workload.context + length
        lengths, batches = [every if keys else length, every], [self.workload.batch]
        found = []
        for axis, size in enumerate(traced):
            if size in self.lengths and lengths:
                found.append(lengths.pop(0))
            elif size == self.batch and batches:
                found.append(batches.pop())
            elif self.tokens and (size == self.tokens or (axis == 0 and size % self.tokens == 0)) and batches:
                found.append(size // self.tokens * batches.pop() * lengths.pop(0))
            elif axis == 0 and len(traced) == 3 and size % self.batch == 0 and self.lengths & {*traced[1:]}:
                found.append(size // self.batch * batches.pop())  # batch x heads
            else:
                found.append(size)
        return found

    def bytes_of(self, node: fx.Node) -> float:
        """What lies in memory: repeats of an expanded axis are not counted."""
        return 0 if self.is_idle(node) else sum(nbytes(_once(t)) for t in _tensors(self.value(node)))


def _as_kept(node: fx.Node) -> Tensor:
    """A matrix that is kept as codes: its rows, in as many bytes as codes and scales have."""
    parts = [source.meta["val"] for source in node.all_input_nodes]
    return torch.empty(len(parts[0]), nbytes(*parts) // len(parts[0]), dtype=torch.uint8, device="meta")


def _tensors(value: Any) -> Iterable[Tensor]:
    values = value if isinstance(value, list | tuple) else (value,)
    return [v for v in values if isinstance(v, Tensor)]


def _once(t: Tensor) -> Tensor:
    for axis, stride in enumerate(t.stride()):
        if stride == 0 and t.shape[axis] > 1:
            t = t.narrow(axis, 0, 1)
    return t


def kind_of(node: fx.Node) -> str:
    """An op's name for people."""
    target: Any = node.target
    if isinstance(target, Op):
        return target.name
    return str(getattr(target, "overloadpacket", getattr(target, "__name__", target))).removeprefix("aten.").strip("_")
