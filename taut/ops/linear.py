"""Matrix product with a weight, as in every linear layer.

Source: Vaswani et al., Attention Is All You Need, 2017, arXiv:1706.03762, section 3 (every projection); the weight
layout (out, in) is PyTorch's, https://docs.pytorch.org/docs/stable/generated/torch.nn.Linear.html. Which product serves
how many tokens: Hong et al., FlashDecoding++, 2023, arXiv:2311.01282, section 5; see `_dispatch`.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import linear as product

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._cpu import refusal
from taut.ops._dispatch import FEW_TOKENS, HAS_ONEDNN, TILE, choose, flat, many
from taut.ops._matvec import matvec, refuses_product, refuses_torch
from taut.ops._weights import dequantize, quantize
from taut.ops._wide import wide


@op
def linear(
    x: Float[Tensor, "*batch k"],
    weight: Shaped[Tensor, "n k_stored"],
    bias: Float[Tensor, " n"] | None = None,
    scale: Float[Tensor, " n *groups"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """x weight^T + bias.

    `weight` is floating point (n, k), of any dtype: where it is not x's, the product is in float32 or wider. With a
    `scale` it is int8 (n, k) with a scale a row, or int4 packed into uint8
    (n, k / 2) with a scale a group of 32 inputs. Raises ValueError where weight and scale do not fit together.
    """
    if weight.dtype == x.dtype:
        return product(x, weight, bias)
    h = wide(x)
    return product(h, dequantize(weight, scale, h.dtype), None if bias is None else bias.to(h.dtype)).to(x.dtype)


@linear.least
def _(x, weight, bias=None, scale=None) -> Work:
    tokens, n = x.numel() // x.shape[-1], weight.shape[0]
    return Work(2 * n * x.numel(), nbytes(x, weight, bias, scale) + tokens * n * x.element_size())


@linear.tests
def _(make):
    yield (make(3, 5, 64), make(40, 64), make(40)), {}
    yield (make(2, 2, 64), make(40, 64), make(40)), {}
    yield (make(3, 80), make(40, 80)), {}
    yield (make(1, 77), make(300, 77)), {}
    for bits in (8, 4):
        weight, scale = quantize(make(24, 96), bits)
        yield (make(7, 96), weight), {"scale": scale}
        yield (make(96), weight), {"scale": scale}


def _slower(way: str, x: Tensor, weight: Tensor) -> Reason:
    """Why another product than `way` serves a call of one dtype."""
    rows = x.numel() // max(x.shape[-1], 1)
    best = choose(rows, weight.shape[0], weight.shape[1], x.dtype)
    if best is not None:
        return None if best == way else f"measured here: the {best} product is the fastest for {rows} tokens"
    if way == "flat":
        return "no table of measured products; `taut machines --measure` makes one"
    return (
        f"torch's own product is faster for more than {FEW_TOKENS} tokens of one dtype" if rows > FEW_TOKENS else None
    )


def _onednn_fits(x, weight, bias=None, scale=None) -> Reason:
    if not HAS_ONEDNN:
        return "this torch was built without oneDNN"
    if x.dtype != torch.float32 or weight.dtype != torch.float32 or scale is not None:
        return "oneDNN's product is torch's own but in float32"
    if x.numel() <= FEW_TOKENS * x.shape[-1]:
        return "a few tokens"
    return "nothing to multiply" if weight.numel() == 0 else refusal(x, bias) or refusal(weight, strided=True)


@linear.impl("onednn", when=_onednn_fits, opaque=True)
def _(x, weight, bias=None, scale=None):
    return many(x, weight, bias)


def _flat_fits(x, weight, bias=None, scale=None) -> Reason:
    if not x.is_cpu:
        return f"a tensor is on {x.device.type}"
    if x.numel() // max(x.shape[-1], 1) % TILE == 0:
        return f"its rows are a multiple of {TILE} as they are"
    return refuses_torch(x, weight) or _slower("flat", x, weight)


@linear.impl("flat", when=_flat_fits)
def _(x: Tensor, weight: Tensor, bias: Tensor | None = None, scale: Tensor | None = None) -> Tensor:
    return flat(x, weight, bias)


def _fits(x, weight, bias=None, scale=None) -> Reason:
    slower = _slower("matvec", x, weight) if x.is_cpu and weight.dtype == x.dtype else None
    return slower or refuses_product(x, weight, scale) or refusal(bias)


def _triton_fits(x, weight, bias=None, scale=None) -> Reason:
    reason = _gpu.refuses_product(x, (weight,), (scale,), bias)
    return reason or _gpu.slower("linear", x, weight, alone=True)


@linear.impl("triton", when=_triton_fits, opaque=True)
def _(x, weight, bias=None, scale=None):
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    config = _gpu.chosen("linear", x, weight, alone=True)
    return _gpu.kernel("launch", "project")(x.reshape(-1, x.shape[-1]), weight, y, config, bias=bias)


@linear.impl("numba", when=_fits, opaque=True)
def _(x, weight, bias=None, scale=None):
    return matvec(x, weight, scale, bias=bias)
