"""What a model computes: the exported graph, its parameters by checkpoint name, runnable at every stage."""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils._python_dispatch import TorchDispatchMode

from taut.op import Op
from taut.values import Filled, Original, Read, Value, reader

Unwritable = Callable[[str, tuple[int, ...] | None], str | None]
"""Why a parameter cannot be given values that vary along some axes (None: along all), or None."""

Watch = Callable[[fx.Node, Any, Callable[[fx.Node], Any]], Any]

LOW = (torch.float32, torch.bfloat16, torch.float16)


class Float64(TorchDispatchMode):
    """Inside, every cast to a narrower floating type casts to float64: what runs is the real-number function."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = dict(kwargs or {})
        if kwargs.get("dtype") in LOW:
            kwargs["dtype"] = torch.float64
        args = tuple(torch.float64 if isinstance(a, torch.dtype) and a in LOW else a for a in args)
        return func(*args, **kwargs)


@dataclass(eq=False)
class Graph:
    """An FX graph of ATen and taut ops with the tensors it reads.

    `tensors` are the model's own, by name (meta tensors where only shapes are known); `values` says what each
    parameter has become; `ties` maps every name of a parameter to the one name used here; `outputs` are the names of
    what the model returns; `written` has the dtype of each parameter that a rewrite added. `read` reads a parameter's
    original rows where `tensors` has only shapes; `unwritable` says what its home on disk does not allow; `stored`
    reads what stands there, for a plan that is made from shapes. Nodes carry in `meta`: `val` (a meta tensor), `where`
    (module path), `line` (source), and placeholders `kind` ("parameter", "buffer" or "input") and `tensor` (its name).
    """

    fx: fx.Graph
    tensors: Mapping[str, Tensor]
    values: dict[str, Value]
    ties: dict[str, str]
    outputs: tuple[str, ...]
    written: dict[str, str] = field(default_factory=dict)
    read: Read | None = None
    unwritable: Unwritable | None = None
    stored: Read | None = None
    memo: dict[Any, Any] | None = None

    @contextlib.contextmanager
    def unchanging(self) -> Iterator[None]:
        """While the graph is only looked at, what has been worked out about it is kept in `memo`."""
        self.memo = {}
        try:
            yield
        finally:
            self.memo = None

    @property
    def nodes(self) -> Iterator[fx.Node]:
        return iter(self.fx.nodes)

    def calls(self, *targets: Any) -> Iterator[fx.Node]:
        """The nodes that call one of the targets, in the order in which they run."""
        return (n for n in self.fx.nodes if n.op == "call_function" and n.target in targets)

    def placeholders(self, kind: str) -> dict[str, fx.Node]:
        return {n.meta["tensor"]: n for n in self.fx.nodes if n.op == "placeholder" and n.meta["kind"] == kind}

    @property
    def output(self) -> fx.Node:
        return next(n for n in reversed(self.fx.nodes) if n.op == "output")

    def names_of(self, parameter: str) -> list[str]:
        """Every name under which the checkpoint may hold a parameter."""
        return [name for name, canonical in self.ties.items() if canonical == parameter] or [parameter]

    def copy(self) -> Graph:
        twin, mapped = fx.Graph(), {}
        result = twin.graph_copy(self.fx, mapped)
        out = twin.output(result)
        out.meta = dict(self.output.meta)
        values, written = dict(self.values), dict(self.written)
        kept = (self.read, self.unwritable, self.stored)
        return Graph(twin, self.tensors, values, self.ties, self.outputs, written, *kept)

    def add_parameter(self, name: str, value: Value, like: Tensor) -> fx.Node:
        """A new parameter with its value; `like` (meta will do) has its shape and dtype."""
        self.values[name], self.written[name] = value, str(like.dtype).removeprefix("torch.")
        return self.add_placeholder("parameter", name, like)

    def add_placeholder(self, kind: str, name: str, like: Tensor) -> fx.Node:
        """A new placeholder in front of all nodes; `like` (meta will do) has its shape and dtype."""
        with self.fx.inserting_before(next(iter(self.fx.nodes))):
            node = self.fx.placeholder(name.replace(".", "_"))
        val = torch.empty(like.shape, dtype=like.dtype, device="meta")
        node.meta = {"kind": kind, "tensor": name, "val": val, "where": "", "line": ""}
        return node

    def read_tensors(self) -> set[str]:
        """The parameters and buffers that something reads."""
        placed = self.placeholders("parameter") | self.placeholders("buffer")
        return {name for name, node in placed.items() if node.users}

    def drop(self, names: set[str]) -> None:
        """Take away parameters and buffers that nothing reads."""
        placed = self.placeholders("parameter") | self.placeholders("buffer")
        for name in names & placed.keys():
            self.fx.erase_node(placed[name])
            self.values.pop(name, None)
            self.written.pop(name, None)

    def insert(self, target: Any, args: tuple, before: fx.Node, kwargs: dict | None = None) -> fx.Node:
        """A new call in front of a node, with its shape worked out on the meta device; it takes that node's place."""
        with self.fx.inserting_before(before):
            node = self.fx.call_function(target, args, kwargs or {})
        node.meta = {"where": before.meta.get("where", ""), "line": before.meta.get("line", "")}
        node.meta["val"] = call(node, lambda n: n.meta["val"], torch.device("meta"))
        return node

    def changed(self) -> dict[str, Value]:
        """The parameters that are no longer the model's own."""
        return {name: value for name, value in self.values.items() if value != Original(name)}

    def holds(self, name: str, wanted: Filled) -> bool:
        """Whether a parameter is known to have one value everywhere: a rewrite gave it, or it stands on disk so."""
        now = self.values[name]
        if now == Original(name) and self.stored is not None:
            return bool((self.stored(name, None) == wanted.value).all())
        return now == wanted

    def evaluate(self, name: str, dtype: torch.dtype | None = torch.float64) -> Tensor:
        """A parameter's present value; in its own dtype when `dtype` is None or it holds integers, rounded once."""
        value, read = self.values[name], self.read or reader(self.tensors)
        if dtype is not None and self.dtype_of(name).is_floating_point:
            return value.evaluate(read).to(dtype)
        if value == Original(name):
            return read(name, None)
        from taut.checkpoint.rounding import round_once

        return round_once(value.evaluate(read), self.dtype_of(name))

    def dtype_of(self, name: str) -> torch.dtype:
        """The dtype in which a parameter is written."""
        return self.tensors[name].dtype if name in self.tensors else getattr(torch, self.written[name])

    def run(
        self,
        inputs: Mapping[str, Tensor],
        parameters: Mapping[str, Tensor] | None = None,
        *,
        float64: bool = False,
        watch: Watch | None = None,
    ) -> dict[str, Tensor]:
        """Run the graph. `float64` computes the real-number function from float64 parameters.

        `parameters` replaces some of this graph's own values; `watch(node, value, value_of)` sees every value and may
        replace it.
        """
        wide = torch.float64 if float64 else None
        given = parameters or {}

        def load(name: str) -> Tensor:
            return given[name] if name in given else self.evaluate(name, wide)

        return _Run(self, inputs, load, watch, float64).run()

    def __str__(self) -> str:
        from taut.printing import text

        return text(self)


class _Run:
    """One run. Parameters are loaded when first read and let go when last read, so that a model need not fit whole."""

    def __init__(
        self,
        graph: Graph,
        inputs: Mapping[str, Tensor],
        load: Callable[[str], Tensor],
        watch: Watch | None,
        float64: bool,
    ) -> None:
        self.graph, self.inputs, self.load, self.watch, self.float64 = graph, inputs, load, watch, float64
        self.device = next((t.device for t in inputs.values()), torch.device("cpu"))
        self.env: dict[fx.Node, Any] = {}

    def run(self) -> dict[str, Tensor]:
        last_reader = {arg: node for node in self.graph.fx.nodes for arg in node.all_input_nodes}
        last_read: dict[fx.Node, list[fx.Node]] = {}
        for arg, node in last_reader.items():
            last_read.setdefault(node, []).append(arg)
        for node in self.graph.fx.nodes:
            if node.op == "output":
                return dict(zip(self.graph.outputs, fx.map_arg(node.args[0], self.value_of), strict=True))
            if node.op != "placeholder":
                value = self.call(node)
                self.env[node] = value if self.watch is None else self.watch(node, value, self.value_of)
                for arg in last_read.get(node, ()):
                    self.env.pop(arg, None)
        raise AssertionError("a graph ends with its output")

    def value_of(self, node: fx.Node) -> Any:
        if node not in self.env:
            value = self.placeholder(node.meta["kind"], node.meta["tensor"])
            self.env[node] = value.double() if self.float64 and value.is_floating_point() else value
        return self.env[node]

    def call(self, node: fx.Node) -> Any:
        if not self.float64:
            return call(node, self.value_of, self.device)
        args = {source: self.value_of(source) for source in node.all_input_nodes}
        default = torch.get_default_dtype()
        torch.set_default_dtype(torch.float64)
        try:
            with Float64():
                return call(node, args.__getitem__, self.device)
        finally:
            torch.set_default_dtype(default)

    def placeholder(self, kind: str, name: str) -> Tensor:
        if kind == "parameter":
            return self.load(name)
        if kind == "buffer":
            return self.graph.tensors[name]
        if name not in self.inputs:
            raise KeyError(f"the graph reads the input {name!r}; the inputs given are {sorted(self.inputs)}")
        return self.inputs[name]


def call(node: fx.Node, value_of: Callable[[fx.Node], Any], device: torch.device) -> Any:
    """Call a node's function; a device recorded when tracing becomes the device of this run."""
    args, kwargs = fx.map_arg((node.args, dict(node.kwargs)), value_of)
    args = tuple(device if isinstance(a, torch.device) else a for a in args)
    kwargs = {k: device if isinstance(v, torch.device) else v for k, v in kwargs.items()}
    target: Any = node.target
    if isinstance(target, Op):
        return target(*args, impl="reference", **kwargs)
    return target(*args, **kwargs)


def shape(node: fx.Node) -> tuple[int, ...]:
    """The shape of a node's tensor; empty for what is not a tensor."""
    value = node.meta.get("val")
    return tuple(value.shape) if isinstance(value, Tensor) else ()


def is_getitem(node: fx.Node) -> bool:
    return node.op == "call_function" and node.target is operator.getitem
