"""Gradients of the products behind a norm: what is kept for them is the raw stream, never the normalised one.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2 (forward); the backward is the chain
rule, with the normalised stream made again from its rows' scalars, as activation checkpointing (Chen et al., 2016,
arXiv:1604.06174) would at the price of one pass.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.functional import linear as product

from taut.ops.glu import glu
from taut.ops.glu_grad import glu_grad
from taut.ops.rms_norm import rms_norm
from taut.ops.rms_norm_grad import rms_norm_grad


def wants_gradient(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)


class NormLinear(Function):
    """rms_norm(x, gain, eps) weight^T + bias; x, weight and bias of one dtype."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, gain: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, gain)
        ctx.eps = eps
        return product(rms_norm(x, gain, eps), weight, bias)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, weight, gain = ctx.saved_tensors
        for_x, for_weight, for_gain, for_bias, _ = ctx.needs_input_grad
        dx, dgain = _through_norm(dy @ weight, x, gain, ctx.eps) if for_x or for_gain else (None, None)
        dweight = _outer(dy, rms_norm(x, gain, ctx.eps)) if for_weight else None
        dbias = _rows(dy).sum(0) if for_bias else None
        return dx, dweight, dgain, dbias, None


class NormGlu(Function):
    """act(h gate^T) * (h up^T) with h = rms_norm(x, gain, eps); x, gate and up of one dtype. Keeps both products."""

    @staticmethod
    def forward(ctx, x: Tensor, gate: Tensor, up: Tensor, gain: Tensor | None, eps: float, act: str) -> Tensor:
        h = rms_norm(x, gain, eps)
        g, u = product(h, gate), product(h, up)
        ctx.save_for_backward(x, gate, up, gain, g, u)
        ctx.eps, ctx.act = eps, act
        return glu(g, u, act)

    @staticmethod
    def backward(ctx, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (dy,) = gradients
        x, gate, up, gain, g, u = ctx.saved_tensors
        for_x, for_gate, for_up, for_gain, *_ = ctx.needs_input_grad
        dg, du = glu_grad(dy.contiguous(), g, u, ctx.act)
        dx = dgain = None
        if for_x or for_gain:
            dh = torch.addmm(_rows(dg) @ gate, _rows(du), up).view(x.shape)
            dx, dgain = _through_norm(dh, x, gain, ctx.eps)
        h = rms_norm(x, gain, ctx.eps) if for_gate or for_up else x
        return dx, _outer(dg, h) if for_gate else None, _outer(du, h) if for_up else None, dgain, None, None


def _through_norm(dh: Tensor, x: Tensor, gain: Tensor | None, eps: float) -> tuple[Tensor, Tensor | None]:
    ones = x.new_ones(x.shape[-1]) if gain is None else gain
    dx, dgain = rms_norm_grad(dh, x, ones, eps)
    return dx, None if gain is None else dgain


def _outer(dy: Tensor, h: Tensor) -> Tensor:
    """The gradient to a weight: dy^T h over all tokens."""
    return _rows(dy).mT @ _rows(h)


def _rows(t: Tensor) -> Tensor:
    return t.reshape(-1, t.shape[-1])
