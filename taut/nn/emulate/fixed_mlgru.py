"""The MLGRU on a fixed-point neuromorphic chip: 8-bit weights, 24-bit activations and state, no floating point.

Source: Abreu, Shrestha, Zhu and Eshraghian, Neuromorphic Principles for Efficient Large Language Models on Intel
    Loihi 2, 2025, arXiv:2503.18002.
Differs: only the widths are the paper's. The binary points (state and activations 20 fraction bits, gates 23) are ours,
    as are the rounding to nearest, and the sigmoid, rounded from its real value as from a full table.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from taut.nn.emulate.fixed_point import FRACTION, from_fixed, inverse_root, shift, shift_round, to_fixed
from taut.nn.ffn.bit_linear import BitLinear, ternary_codes
from taut.nn.mixer.mlgru import MLGRU
from taut.nn.norm.rms_norm import RMSNorm

BITS = 24
STATE_FRACTION = 20
GATE_FRACTION = 23


def saturate(x: Tensor, bits: int = BITS) -> Tensor:
    return x.clamp(-(2 ** (bits - 1)), 2 ** (bits - 1) - 1)


def recurrence_fixed(forget: Tensor, inputs: Tensor, state: Tensor | None = None) -> Tensor:
    """h_t = forget_t h_{t-1} + inputs_t on integers [..., T, d]: forget with GATE_FRACTION bits behind the point, the
    others with STATE_FRACTION; every h_t is rounded to nearest and saturated to 24 bits."""
    state = torch.zeros_like(inputs[..., 0, :]) if state is None else state
    states = []
    for t in range(inputs.shape[-2]):
        state = saturate(shift_round(forget[..., t, :] * state, GATE_FRACTION) + inputs[..., t, :])
        states.append(state)
    return torch.stack(states, -2)


def rms_norm_fixed(x: Tensor, gain: Tensor) -> Tensor:
    """RMSNorm of integers [..., d] with STATE_FRACTION bits, times an integer gain with as many; no epsilon."""
    narrow = x >> 4
    square = (narrow * narrow).sum(-1, keepdim=True).clamp(min=1)
    mantissa, exponent = inverse_root(square, steps=4)
    root = round(x.shape[-1] ** 0.5 * 2**10)
    y = shift(narrow * ((mantissa * root) >> 10), STATE_FRACTION - FRACTION - exponent)
    return saturate(shift_round(saturate(y) * gain, STATE_FRACTION))


def sigmoid_fixed(x: Tensor) -> Tensor:
    """Sigmoid of integers with STATE_FRACTION bits, as integers with GATE_FRACTION bits."""
    return to_fixed(torch.sigmoid(from_fixed(x, STATE_FRACTION, torch.float64)), GATE_FRACTION, BITS)


@dataclass(frozen=True)
class FixedLinear:
    """A BitLinear with int8 weight codes, one integer scale with 23 fraction bits and a gain with STATE_FRACTION bits.

    Activations stay at 24 bits: the 8-bit codes of the floating-point model are not needed where they save nothing.
    """

    codes: Tensor
    scale: int
    gain: Tensor

    @classmethod
    def port(cls, layer: BitLinear) -> FixedLinear:
        codes, scale = ternary_codes(layer.weight.detach().double())
        return cls(codes.to(torch.int8), round(scale.item() * 2**GATE_FRACTION), _gain(layer.norm))

    def __call__(self, x: Tensor) -> Tensor:
        product = rms_norm_fixed(x, self.gain) @ self.codes.long().T
        return saturate(shift_round(product * self.scale, GATE_FRACTION))


def _gain(norm: RMSNorm) -> Tensor:
    if norm.weight is None or norm.gain != "plain":
        raise ValueError("the fixed-point port takes norms with a plain gain; write 1 + weight into a plain one first")
    return to_fixed(norm.weight.detach(), STATE_FRACTION, BITS)


class FixedMLGRU:
    """An MLGRU's fixed-point port: x [batch, T, d] in floating point to y [batch, T, d], integers in between."""

    def __init__(self, layer: MLGRU) -> None:
        parts = (layer.i_proj, layer.f_proj, layer.g_proj, layer.o_proj)
        self.i_proj, self.f_proj, self.g_proj, self.o_proj = map(FixedLinear.port, parts)
        self.g_gain = _gain(layer.g_norm)

    def gates(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers (forget, inputs) from integers x [batch, T, d]."""
        forget = sigmoid_fixed(self.f_proj(x))
        candidate = self.i_proj(x)
        candidate = shift_round(candidate * sigmoid_fixed(candidate), GATE_FRACTION)
        return forget, shift_round(candidate * (2**GATE_FRACTION - forget), GATE_FRACTION)

    def __call__(self, x: Tensor) -> Tensor:
        codes = to_fixed(x, STATE_FRACTION, BITS)
        h = recurrence_fixed(*self.gates(codes))
        swish = shift_round(h * sigmoid_fixed(h), GATE_FRACTION)
        gated = shift_round(rms_norm_fixed(self.g_proj(codes), self.g_gain) * swish, STATE_FRACTION)
        return from_fixed(self.o_proj(saturate(gated)), STATE_FRACTION, x.dtype)
