"""What the matchers share: looking through casts, and telling parameters from activations."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from taut.graph import Graph, shape

aten = torch.ops.aten

CASTS = {
    aten._to_copy.default,
    aten.to.dtype,
    aten.to.dtype_layout,
    aten.to.device,
    aten.type_as.default,
    aten.alias.default,
    aten.clone.default,
    aten.contiguous.default,
    aten.detach.default,
    aten.lift_fresh_copy.default,
    aten.dropout.default,
}


def is_call(node: Any, *targets: Any) -> bool:
    return isinstance(node, fx.Node) and node.op == "call_function" and node.target in targets


REALS = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def is_cast(node: Any) -> bool:
    """Whether a node is its argument as a real number: a cast to integers, bool or eight bits is not."""
    if not is_call(node, *CASTS):
        return False
    if node.target is aten.dropout.default and node.args[2]:
        return False
    had, has = (n.meta["val"].dtype for n in (node.args[0], node))
    return has == had or (has in REALS and not had.is_complex)


def through_casts(node: Any) -> Any:
    """The node before any casts."""
    while is_cast(node):
        node = node.args[0]
    return node


def after_casts(node: fx.Node) -> fx.Node:
    """The last of the casts that alone read a node."""
    users = list(node.users)
    while len(users) == 1 and is_cast(users[0]):
        node, users = users[0], list(users[0].users)
    return node


def is_constant(node: Any, known: dict[fx.Node, bool]) -> bool:
    """Whether a node is computed from parameters and numbers alone. A deep model is no deep recursion."""
    if not isinstance(node, fx.Node):
        return True
    todo = [node]
    while todo:
        last = todo[-1]
        missing = [] if last in known else [i for i in last.all_input_nodes if i not in known]
        todo += missing
        if not missing:
            known.setdefault(todo.pop(), _made_of_constants(last, known))
    return known[node]


def _made_of_constants(node: fx.Node, known: dict[fx.Node, bool]) -> bool:
    if node.op == "placeholder":
        return node.meta["kind"] == "parameter"
    inputs = node.all_input_nodes
    return node.op == "call_function" and bool(inputs) and all(known[i] for i in inputs)


def other(node: fx.Node, one: fx.Node) -> Any:
    """The other operand of a binary node."""
    first, second = node.args[:2]
    return second if first is one else first


def replace(graph: Graph, old: fx.Node, op: Any, args: tuple, where: str | None = None) -> fx.Node:
    """Put a call of `op` where `old` is; what it returns has old's dtype."""
    with graph.fx.inserting_after(old):
        new = graph.fx.call_function(op, args)
    new.meta = dict(old.meta) if where is None else dict(old.meta) | {"where": where}
    last = new
    source, wanted = args[0].meta.get("val"), old.meta.get("val")
    if isinstance(wanted, Tensor) and isinstance(source, Tensor) and source.dtype != wanted.dtype:
        new.meta["val"] = torch.empty(shape(old), dtype=source.dtype, device="meta")
        with graph.fx.inserting_after(new):
            last = graph.fx.call_function(aten._to_copy.default, (new,), {"dtype": wanted.dtype})
        last.meta = dict(old.meta)
    old.replace_all_uses_with(last, delete_user_cb=lambda user: user is not new and user is not last)
    return new
