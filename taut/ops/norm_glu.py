"""RMSNorm and the gated half of a feed-forward behind it, with the division deferred past both products.

Source: Graef, Wasielewski and Clapp, FlashNorm, 2024, arXiv:2407.09577, section 2.2.
Differs: with an activation that is not homogeneous the scalar is put in right before it; one rounding at the end.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor
from torch.nn.functional import linear as product

from taut.op import Reason, Work, nbytes, op
from taut.ops import _gpu
from taut.ops._activation import ACTIVATIONS, activation
from taut.ops._cpu import address, kernel, tag, threads
from taut.ops._matvec import refuses_product, refuses_torch
from taut.ops._training import NormGlu, wants_gradient
from taut.ops._weights import dequantize, quantize
from taut.ops._wide import wide
from taut.ops.glu import glu
from taut.ops.inv_rms import inv_rms
from taut.ops.linear import linear
from taut.ops.rms_norm import rms_norm


@op
def norm_glu(
    x: Float[Tensor, "*batch k"],
    gate: Shaped[Tensor, "n k_stored"],
    up: Shaped[Tensor, "n k_stored"],
    gain: Float[Tensor, " k"] | None = None,
    eps: float | Tensor = 1e-6,
    act: str = "silu",
    gate_scale: Float[Tensor, " n *groups"] | None = None,
    up_scale: Float[Tensor, " n *groups"] | None = None,
) -> Float[Tensor, "*batch n"]:
    """act(h gate^T) * (h up^T) with h = rms_norm(x, gain, eps), rounded once to x's dtype.

    The weights and their scales as in `linear`; `eps` is a number, or a tensor that broadcasts to `x[..., :1]`.
    Raises ValueError for an unknown activation.
    """
    h = wide(x)
    h = h if gain is None else h * gain
    s = inv_rms.reference(x, eps)
    g = h @ dequantize(gate, gate_scale, h.dtype).mT * s
    u = h @ dequantize(up, up_scale, h.dtype).mT * s
    return (activation(act)(g) * u).to(x.dtype)


@norm_glu.least
def _(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None) -> Work:
    tokens, n = x.numel() // x.shape[-1], gate.shape[0]
    read = nbytes(x, gate, up, gain, gate_scale, up_scale)
    return Work((4 * n + 2) * x.numel() + 5 * tokens * n, read + tokens * n * x.element_size())


@norm_glu.tests
def _(make):
    for act in ACTIVATIONS:
        yield (make(2, 3, 64), make(40, 64), make(40, 64), make(64), 1e-5, act), {}
    yield (make(1, 77), make(300, 77), make(300, 77)), {"eps": 1e-2}
    for bits in (8, 4):
        (gate, gate_scale), (up, up_scale) = quantize(make(24, 96), bits), quantize(make(24, 96), bits)
        yield (make(7, 96), gate, up), {"gate_scale": gate_scale, "up_scale": up_scale}


def _fits(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None) -> Reason:
    if isinstance(eps, Tensor):
        return "eps is a tensor"
    if act not in ACTIVATIONS:
        return f"no activation {act!r}"
    if gate.dtype != up.dtype or (
        gate_scale is not None and up_scale is not None and gate_scale.dtype != up_scale.dtype
    ):
        return "gate and up are stored differently"
    return refuses_product(x, gate, gate_scale, gain) or refuses_product(x, up, up_scale)


def _torch_fits(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None) -> Reason:
    return refuses_torch(x, gate, up)


@norm_glu.impl("torch", when=_torch_fits)
def _(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None):
    if wants_gradient(x, gate, up, gain) and not isinstance(eps, Tensor):
        return NormGlu.apply(x, gate, up, gain, eps, act)
    h = rms_norm(x, gain, eps)
    return glu(linear(h, gate), linear(h, up), act)


def _triton_fits(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None) -> Reason:
    if isinstance(eps, Tensor):
        return "eps is a tensor"
    if act not in ACTIVATIONS:
        return f"no activation {act!r}"
    if gain is not None and _gpu.many(x):
        return "a gain that is not folded into the weight, and a product of the raw stream"
    if x.dtype == torch.float16 and _gpu.many(x):
        return "a product that is rounded before the division may leave float16's range"
    reason = _gpu.refuses_product(x, (gate, up), (gate_scale, up_scale), gain)
    return reason or (None if _gpu.many(x) else _gpu.slower("glu", x, gate))


@norm_glu.impl("triton", when=_triton_fits, opaque=True)
def _(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None):
    y = x.new_empty(*x.shape[:-1], gate.shape[0])
    flat = x.reshape(-1, x.shape[-1])
    if _gpu.many(x):
        return _gpu.kernel("rows", "glu_rows")(flat, product(flat, gate), product(flat, up), y, eps, act)
    config = _gpu.chosen("glu", x, gate)
    _gpu.kernel("launch", "project")(flat, gate, y, config, up=up, act=act, gain=gain, eps=eps)
    return y


@norm_glu.impl("numba", when=_fits, opaque=True)
def _(x, gate, up, gain=None, eps=1e-6, act="silu", gate_scale=None, up_scale=None):
    n, k = gate.shape[0], x.shape[-1]
    tokens = x.numel() // k
    y = x.new_empty(*x.shape[:-1], n)
    weights = address(gate), address(gate_scale), address(up), address(up_scale)
    tags = tag(x), tag(gate), tag(gate_scale), tag(gain)
    options = eps, kernel("products", "ACTS").index(act), threads(nbytes(gate, up))
    kernel("products", "norm_glu")(address(x), *weights, address(gain), address(y), tokens, k, n, *options, *tags)
    return y
