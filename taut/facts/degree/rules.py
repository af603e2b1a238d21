"""The rule of every op that is known."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import fx

from taut.facts.degree import elementwise, movement, sums
from taut.facts.degree.elementwise import ADDS, EXPONENTS
from taut.facts.degree.records import Scaled
from taut.facts.degree.sums import ARGS, RANKS
from taut.facts.degree.walk import NOT_PROPORTIONAL, Walk
from taut.facts.moves import MOVES
from taut.ops.attention import attention
from taut.ops.glu import glu
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.ops.rope import rope

aten = torch.ops.aten
NORMS = (rms_norm, layer_norm)

Rule = Callable[[Walk, fx.Node], "Scaled | str | None"]
"""What a node makes of the scalars it is given: Scaled, None where nothing is left, or why it needs degree 0."""


def unknown(walk: Walk, node: fx.Node) -> str:
    return NOT_PROPORTIONAL


def mixes_tokens(walk: Walk, node: fx.Node) -> str:
    return "mixes tokens, each with a scale of its own"


def shape_only(walk: Walk, node: fx.Node) -> None:
    return None


def output(walk: Walk, node: fx.Node) -> str:
    return "it is an output of the model"


KEEPS = (aten.neg.default, aten.relu.default, aten.abs.default, aten.leaky_relu.default, aten.prelu.default)
REDUCES = (aten.sum.dim_IntList, aten.mean.dim, aten.amax.default, aten.amin.default)

SHAPES_ONLY = (
    aten.new_empty.default,
    aten.new_zeros.default,
    aten.new_ones.default,
    aten.new_full.default,
    aten.empty_like.default,
    aten.zeros_like.default,
    aten.ones_like.default,
    aten.full_like.default,
    aten.sym_size.int,
)

RULES: dict[Any, Rule] = {
    "output": output,
    **dict.fromkeys((attention, aten.scaled_dot_product_attention.default), mixes_tokens),
    **dict.fromkeys(SHAPES_ONLY, shape_only),
    rope: elementwise.rope,
    glu: elementwise.glu,
    **dict.fromkeys(NORMS, sums.norm),
    **dict.fromkeys(KEEPS, elementwise.keep),
    **dict.fromkeys((aten.clamp_min.default, aten.clamp.default, aten.masked_fill.Scalar), elementwise.keep_if_zero),
    **dict.fromkeys((aten.pow.Tensor_Scalar, *EXPONENTS), elementwise.power),
    **dict.fromkeys(MOVES, movement.move),
    operator.getitem: movement.item,
    **dict.fromkeys((aten.cat.default, aten.stack.default), movement.join),
    **dict.fromkeys((aten.mul.Tensor, aten.div.Tensor), elementwise.times),
    **dict.fromkeys((*ADDS, aten.maximum.default, aten.minimum.default, aten.where.self), elementwise.same),
    **dict.fromkeys(REDUCES, sums.reduce),
    **dict.fromkeys((*RANKS, *ARGS), sums.rank),
    **dict.fromkeys((aten.matmul.default, aten.bmm.default, aten.mm.default), sums.token_product),
    **dict.fromkeys((aten.view_as_complex.default, aten.view_as_real.default), movement.pairs),
}
