"""Batch norm: one spelling for what export may call by two names."""

from __future__ import annotations

from typing import Any

import torch

from taut.graph import Graph, is_getitem
from taut.lift._match import is_call

ORDER = 1
aten = torch.ops.aten
NO_TRAINING = aten._native_batch_norm_legit_no_training.default


def lift(graph: Graph) -> None:
    """The decomposed call returns its statistics too; where nobody takes them, it is aten.batch_norm."""
    for node in list(graph.nodes):
        source: Any = node.args[0] if is_getitem(node) and node.args[1] == 0 else None
        if is_call(source, NO_TRAINING) and list(source.users) == [node]:
            x, gain, bias, mean, variance, momentum, eps = source.args
            args = (x, gain, bias, mean, variance, False, momentum, eps, False)
            new = graph.insert(aten.batch_norm.default, args, node)
            new.meta["where"], new.meta["line"] = source.meta["where"], source.meta["line"]
            node.replace_all_uses_with(new)
