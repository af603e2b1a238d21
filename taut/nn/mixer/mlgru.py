"""MLGRU: the token mixer of the MatMul-free language model, a gated recurrence that is linear in its state.

Source: Zhu et al., Scalable MatMul-free Language Modeling, 2024, arXiv:2406.02528, section 3.2; the block without its
    outer division follows from RMSNorm(g x / RMS(x)) = RMSNorm(g x).
Differs: the parallel form is a scan in log2(T) steps, which neither divides nor takes logarithms.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from taut.nn.ffn.bit_linear import BitLinear
from taut.nn.ffn.matmul_free_glu import MatMulFreeGLU
from taut.nn.norm.rms_norm import RMSNorm


def linear_recurrence(forget: Tensor, inputs: Tensor, state: Tensor | None = None) -> Tensor:
    """h_t = forget_t * h_{t-1} + inputs_t for [..., T, d], step by step, from `state` [..., d] or zero."""
    state = torch.zeros_like(inputs[..., 0, :]) if state is None else state
    states = []
    for t in range(inputs.shape[-2]):
        state = forget[..., t, :] * state + inputs[..., t, :]
        states.append(state)
    return torch.stack(states, -2)


def linear_scan(forget: Tensor, inputs: Tensor, state: Tensor | None = None) -> Tensor:
    """What `linear_recurrence` gives, in log2(T) parallel steps: after each, a row covers twice as many tokens."""
    if state is not None:
        first = inputs[..., :1, :] + forget[..., :1, :] * state[..., None, :]
        inputs = torch.cat([first, inputs[..., 1:, :]], -2)
    reach = 1
    while reach < inputs.shape[-2]:
        tail = inputs[..., reach:, :] + forget[..., reach:, :] * inputs[..., :-reach, :]
        inputs = torch.cat([inputs[..., :reach, :], tail], -2)
        forget = torch.cat([forget[..., :reach, :], forget[..., reach:, :] * forget[..., :-reach, :]], -2)
        reach *= 2
    return inputs


def forget_floors(logits: Tensor) -> Tensor:
    """Lower bounds [layers, d] of the forget gates from trained logits [layers, d]: 0 in the first layer, rising."""
    shares = logits.softmax(0)
    return shares.cumsum(0) - shares[0]


class MLGRU(nn.Module):
    """x [batch, T, d] to (y [batch, T, d], state [batch, d]); with a state it continues where that one ended.

    f = sigmoid(F x), raised to at least `floor` [d]; h_t = f_t h_{t-1} + (1 - f_t) silu(I x)_t;
    y = O(RMSNorm(G x) h sigmoid(h)), every projection a BitLinear.
    """

    def __init__(self, d: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.i_proj, self.f_proj, self.g_proj, self.o_proj = (BitLinear(d, d) for _ in range(4))
        self.g_norm = RMSNorm(d, eps)

    def gates(self, x: Tensor, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(forget, inputs) of the recurrence, [batch, T, d] each."""
        forget = torch.sigmoid(self.f_proj(x))
        if floor is not None:
            forget = floor + (1 - floor) * forget
        return forget, F.silu(self.i_proj(x)) * (1 - forget)

    def forward(self, x: Tensor, state: Tensor | None = None, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        h = linear_scan(*self.gates(x, floor), state)
        return self.o_proj(self.g_norm(self.g_proj(x)) * h * torch.sigmoid(h)), h[..., -1, :]


class Gain(nn.Module):
    """x * weight: what is left of an RMSNorm whose division its reader repeats. Loads an RMSNorm's parameters."""

    def __init__(self, d: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(d))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.weight


class MatMulFreeBlock(nn.Module):
    """x + MLGRU(norm(x)), then x + GLU(norm(x)), for x [batch, T, d].

    `outer_norm=False` leaves out the two divisions, since the BitLinear layers behind them normalise again: the same
    function up to epsilon (5e-7 relative at mean(x^2) = 1e-2), except where a rounding tie of the 8-bit codes flips.
    """

    def __init__(self, d: int, hidden: int | None = None, eps: float = 1e-6, *, outer_norm: bool = True) -> None:
        super().__init__()
        self.attn_norm = RMSNorm(d, eps) if outer_norm else Gain(d)
        self.mlp_norm = RMSNorm(d, eps) if outer_norm else Gain(d)
        self.attn, self.mlp = MLGRU(d, eps), MatMulFreeGLU(d, hidden)

    def forward(self, x: Tensor, state: Tensor | None = None, floor: Tensor | None = None) -> tuple[Tensor, Tensor]:
        mixed, last = self.attn(self.attn_norm(x), state, floor)
        x = x + mixed
        return x + self.mlp(self.mlp_norm(x)), last
