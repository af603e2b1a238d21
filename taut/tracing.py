"""From a model to its Graph: torch.export, with the checkpoint's names kept and nothing hidden in sub-graphs."""

from __future__ import annotations

import contextlib
import inspect
import io
import logging
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from taut.graph import Graph
from taut.values import Original

aten = torch.ops.aten

# Checks that export inserts; they compute nothing.
ASSERTIONS = {
    aten._assert_tensor_metadata.default,
    aten._assert_async.msg,
    aten._assert_scalar.default,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}

OUTPUTS = ("all", "logits")
"""Which outputs may be promised."""

# What they return is another thing in every run, and so is the model.
RANDOM = ("rand", "randn", "randint", "randperm", "rand_like", "randn_like", "randint_like")
RANDOM += ("bernoulli", "multinomial", "normal", "normal_functional", "uniform", "exponential", "poisson")

# They ask for strides that what a rewrite puts in front of them may not have; a reshape does not.
VIEWS = {aten.view.default, aten._unsafe_view.default}


class CannotTrace(Exception):
    """The model's forward cannot be exported; the message says which operation and where."""


def trace(model: nn.Module, inputs: Mapping[str, Tensor], *, outputs: str = "all", symbolic: bool = False) -> Graph:
    """Export a model in eval mode to a Graph, on the device its tensors are on (meta will do for everything static).

    `inputs` are keyword tensors. `outputs="all"` promises every output of the model's class and the hidden state that
    its base model returns; `"logits"` promises the first output alone. A `symbolic` trace runs at any batch and
    length that the model allows. Raises CannotTrace with the reason.
    """
    if outputs not in OUTPUTS:
        raise ValueError(f"no outputs {outputs!r}: take one of {', '.join(OUTPUTS)}")
    names: list[str] = []
    wrapper = _Promised(model, outputs, names.append)
    with traceable(model), torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            shapes = ({name: _any_shape(tensor) for name, tensor in inputs.items()},) if symbolic else None
            exported = torch.export.export(wrapper, (dict(inputs),), strict=False, dynamic_shapes=shapes)
            if hides_something(exported.graph):
                exported = exported.run_decompositions({})
            return imported(exported, model, tuple(inputs), tuple(dict.fromkeys(names)))
        except CannotTrace:
            raise
        except Exception as error:
            raise CannotTrace(reason(error)) from error


def _any_shape(tensor: Tensor) -> dict[int, Any]:
    """Export finds out which of the first two axes, batch and length, may vary."""
    return dict.fromkeys(range(min(2, tensor.ndim)), torch.export.Dim.AUTO)


class _Promised(nn.Module):
    """Returns the promised outputs as a flat list of tensors, and tells their names."""

    def __init__(self, model: nn.Module, outputs: str, tell: Callable[[str], None]) -> None:
        super().__init__()
        self.model, self.outputs, self.tell = model, outputs, tell

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        seen: dict[str, Tensor] = {}
        base = getattr(self.model, "base_model", self.model)
        hook = base.register_forward_hook(lambda _m, _a, out: seen.update(_hidden(out)))
        try:
            result = self.model(**inputs, **_switches(self.model))
        finally:
            hook.remove()
        named = dict(named_tensors(result))
        if not named:
            raise CannotTrace("the model returns no floating-point tensor")
        if self.outputs == "all":
            for name, tensor in seen.items():
                if all(tensor is not other for other in named.values()):
                    named.setdefault(name if name not in named else f"base.{name}", tensor)
        else:
            first = "logits" if "logits" in named else next(iter(named))
            named = {first: named[first]}
        for name in named:
            self.tell(name)
        return list(named.values())


def _hidden(out: Any) -> dict[str, Tensor]:
    state = getattr(out, "last_hidden_state", None)
    return {"last_hidden_state": state} if isinstance(state, Tensor) else {}


def named_tensors(result: Any) -> Iterator[tuple[str, Tensor]]:
    """The floating-point tensors of any output structure, with readable names."""
    for path, leaf in pytree.tree_leaves_with_path(result if not hasattr(result, "items") else dict(result.items())):
        if isinstance(leaf, Tensor) and leaf.is_floating_point():
            keys = [str(getattr(key, "key", getattr(key, "idx", key))) for key in path]
            yield ".".join(keys) or "output", leaf


def _switches(model: nn.Module) -> dict[str, Any]:
    """The keyword arguments that keep caches out of the graph, where the forward has them."""
    known = inspect.signature(model.forward).parameters
    return {name: value for name, value in (("use_cache", False), ("return_dict", True)) if name in known}


@contextlib.contextmanager
def traceable(model: nn.Module, experts: str = "grouped_mm") -> Iterator[None]:
    """Set, for the time of the trace, what configuration decides: attention and experts as exportable products."""
    was_training, saved = model.training, []
    model.eval()
    for config in _configs(model):
        for key, wanted in (("use_cache", False), ("_experts_implementation_internal", experts)):
            if hasattr(config, key) and getattr(config, key) != wanted:
                saved.append((config, key, getattr(config, key)))
                setattr(config, key, wanted)
        if str(getattr(config, "_attn_implementation", "")).startswith(("flash", "flex", "paged")):
            saved.append((config, "_attn_implementation", config._attn_implementation))
            config._attn_implementation = "sdpa"
    try:
        yield
    finally:
        for config, key, value in saved:
            setattr(config, key, value)
        model.train(was_training)


def _configs(model: nn.Module) -> list[Any]:
    found: dict[int, Any] = {}
    for module in model.modules():
        config = getattr(module, "config", None)
        if config is not None and not isinstance(config, dict):
            found[id(config)] = config
    return list(found.values())


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Export logs and prints at length about what it does not know of; the reason is in the exception."""
    loggers = [logging.getLogger(name) for name in ("torch.export", "torch._export", "torch.fx", "torch._dynamo")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def hides_something(graph: fx.Graph) -> bool:
    """In-place writes and sub-graphs hide who reads what; decomposing makes both plain, but takes as long again."""
    for node in graph.nodes:
        if node.op in ("get_attr", "call_module"):
            return True
        if node.op == "call_function":
            schema = getattr(node.target, "_schema", None)
            if schema is not None and schema.is_mutable:
                return True
            if isinstance(node.target, torch._ops.HigherOrderOperator):
                return True
    return False


def reason(error: Exception) -> str:
    text = str(error).strip() or type(error).__name__
    return f"{type(error).__name__}: {text.splitlines()[0][:300]}"


def imported(
    exported: torch.export.ExportedProgram, model: nn.Module, inputs: tuple[str, ...], names: tuple[str, ...]
) -> Graph:
    """The Graph of an exported wrapper whose attribute `model` is the model."""
    signature, graph = exported.graph_signature, exported.graph
    tensors = dict(model.state_dict(keep_vars=True)) | dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    ties = _ties(model)
    values: dict[str, Any] = {}
    input_names = dict(zip(signature.user_inputs, inputs, strict=True))
    for node in list(graph.nodes):
        if node.op == "placeholder":
            _name_placeholder(node, exported, ties, tensors, values, input_names)
        elif node.op == "call_function":
            if node.target in ASSERTIONS:
                graph.erase_node(node)
            else:
                _annotate(node)
    _without_copies(graph)
    _merge_placeholders(graph)
    _note_unread_names(graph, model, ties)
    _keep_outputs(graph, signature)
    graph.eliminate_dead_code()
    _refuse_randomness(graph)
    if len(_output(graph).args[0]) != len(names):
        raise CannotTrace("the exported program does not return every output of the model")
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return Graph(graph, tensors, values, ties, names)


def _refuse_randomness(graph: fx.Graph) -> None:
    for node in graph.nodes:
        name = str(getattr(node.target, "_schema", "")).removeprefix("aten::").split("(")[0].split(".")[0]
        if node.op == "call_function" and name in RANDOM:
            raise CannotTrace(f"its forward draws random numbers ({name} in {node.meta['where'] or 'the model'})")


def _ties(model: nn.Module) -> dict[str, str]:
    """Every name of a parameter to one name: parameters are the same when they are one object or share storage."""
    first: dict[Any, str] = {}
    ties: dict[str, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        key: Any = id(parameter)
        if parameter.device.type != "meta":
            start = parameter.untyped_storage().data_ptr(), parameter.storage_offset()
            key = (*start, parameter.shape, parameter.stride())
        ties[name] = first.setdefault(key, name)
    return ties


def _note_unread_names(graph: fx.Graph, model: nn.Module, ties: Mapping[str, str]) -> None:
    """Note at each tied parameter the names under which no node reads it: who reads those is not known.

    A name belongs to the module that holds it. It is read where a node inside that module, under whichever of the
    module's paths, reads the parameter; so both names of an embedding that is also the head are, and a bias that a
    head keeps for its decoder is, but a layer that is never called keeps its own.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    shared = [name for name, count in Counter(ties.values()).items() if count > 1]
    for node in graph.find_nodes(op="placeholder"):
        if node.meta["kind"] == "parameter" and node.meta["tensor"] in shared:
            inside = {id(modules.get(path)) for user in node.users for path in _paths(user.meta.get("where", ""))}
            names = [name for name, canonical in ties.items() if canonical == node.meta["tensor"]]
            unread = [name for name in names if id(modules[name.rpartition(".")[0]]) not in inside]
            node.meta["unread"] = tuple(unread)


def _paths(where: str) -> Iterator[str]:
    """A module's path and those of all modules that it is in."""
    yield ""
    for end, letter in enumerate(where + "."):
        if letter == ".":
            yield where[:end]


def _name_placeholder(node: fx.Node, exported, ties, tensors, values, input_names) -> None:
    signature = exported.graph_signature
    if node.name in signature.inputs_to_parameters:
        name = signature.inputs_to_parameters[node.name].removeprefix("model.")
        kind, name = "parameter", ties[name]
        values[name] = Original(name)
    elif node.name in signature.inputs_to_buffers:
        kind, name = "buffer", signature.inputs_to_buffers[node.name].removeprefix("model.")
    elif node.name in signature.inputs_to_lifted_tensor_constants:
        kind, name = "buffer", signature.inputs_to_lifted_tensor_constants[node.name]
        tensors[name] = exported.constants[name]
    else:
        kind, name = "input", input_names[node.name]
    node.meta = {"kind": kind, "tensor": name, "val": _meta(node.meta.get("val")), "where": "", "line": ""}


def _annotate(node: fx.Node) -> None:
    """Keep of export's notes the module path, the source line and the shape; ask for no strides."""
    if node.target in VIEWS:
        node.target = aten.reshape.default
    if node.target is aten.rms_norm.default and (*node.args, None, None)[3] is None:
        # None means the epsilon of the dtype it computes in, which would be another model in float64.
        x, sizes, gain = (*node.args, None)[:3]
        wide = torch.float64 if node.meta["val"].dtype is torch.float64 else torch.float32
        node.args = (x, sizes, gain, torch.finfo(wide).eps)
    stack = list((node.meta.get("nn_module_stack") or {}).values())
    where = str(stack[-1][0]) if stack else ""
    where = where.removeprefix("model").removeprefix(".") if where.startswith("model") else where
    lines = [part.strip() for part in (node.meta.get("stack_trace") or "").split("\n") if part.strip()]
    node.meta = {"val": _meta(node.meta.get("val")), "where": where, "line": lines[-1] if lines else ""}


def _meta(value: Any) -> Any:
    """Shapes as meta tensors with plain integers, so that facts need no symbolic arithmetic."""

    def plain(v: Any) -> Any:
        if isinstance(v, Tensor):
            return torch.empty_strided(
                [int(s) for s in v.shape], [int(s) for s in v.stride()], dtype=v.dtype, device="meta"
            )
        return int(v) if isinstance(v, torch.SymInt) else v

    return pytree.tree_map(plain, value)


def _without_copies(graph: fx.Graph) -> None:
    """copy(a, b) is b in a's shape and dtype; an in-place write leaves it behind, and it hides a movement."""
    for node in list(graph.find_nodes(op="call_function", target=aten.copy.default)):
        new, wanted = node.args[1], node.meta["val"]
        had = new.meta["val"]
        steps = []
        if had.shape != wanted.shape:
            steps.append((aten.expand.default, (list(wanted.shape),), {}))
        if had.dtype != wanted.dtype:
            steps.append((aten._to_copy.default, (), {"dtype": wanted.dtype}))
        for target, args, kwargs in steps:
            with graph.inserting_before(node):
                new = graph.call_function(target, (new, *args), kwargs)
            new.meta = dict(node.meta)
        node.replace_all_uses_with(new)
        graph.erase_node(node)


def _merge_placeholders(graph: fx.Graph) -> None:
    """One placeholder a parameter: export may give a tied parameter two."""
    seen: dict[tuple[str, str], fx.Node] = {}
    for node in list(graph.nodes):
        if node.op == "placeholder":
            first = seen.setdefault((node.meta["kind"], node.meta["tensor"]), node)
            if first is not node:
                node.replace_all_uses_with(first)
                graph.erase_node(node)


def _output(graph: fx.Graph) -> Any:
    return next(n for n in reversed(graph.nodes) if n.op == "output")


def _keep_outputs(graph: fx.Graph, signature) -> None:
    """Drop the outputs that export added for buffers which the forward writes."""
    out = _output(graph)
    user = set(signature.user_outputs)
    out.args = (tuple(n for n in out.args[0] if n is not None and n.name in user),)
    out.meta = {"val": None, "where": "", "line": ""}
