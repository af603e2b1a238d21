import itertools

import torch
import torch.nn.functional as F

from taut.nn.emulate.fixed_mlgru import (
    BITS,
    GATE_FRACTION,
    STATE_FRACTION,
    FixedMLGRU,
    recurrence_fixed,
    rms_norm_fixed,
)
from taut.nn.emulate.fixed_point import from_fixed, inverse_root, to_fixed
from taut.nn.ffn.bit_linear import ternary_codes
from taut.nn.mixer.mlgru import MLGRU, linear_recurrence, linear_scan


def test_inverse_root_converges_quadratically():
    x = torch.unique(torch.logspace(0, 15, 4000, dtype=torch.float64).long())
    errors = []
    for steps in (0, 1, 2, 3):
        mantissa, exponent = inverse_root(x, steps)
        value = mantissa.double() * torch.exp2(-(28.0 + exponent))
        errors.append((value * x.double().sqrt() - 1).abs().max().item())
    assert 0.15 < errors[0] < 0.2
    for before, after in itertools.pairwise(errors):
        assert after <= 1.6 * before**2 + 1e-7


def test_24_bit_state_follows_the_real_one_for_2048_steps():
    torch.manual_seed(0)
    forget = torch.sigmoid(torch.randn(4, 2048, 32).double() + 2)
    inputs = F.silu(torch.randn(4, 2048, 32).double()) * (1 - forget)
    codes = recurrence_fixed(to_fixed(forget, GATE_FRACTION, BITS), to_fixed(inputs, STATE_FRACTION, BITS))
    assert codes.abs().max() < 2 ** (BITS - 1)
    error = (from_fixed(codes, STATE_FRACTION, torch.float64) - linear_recurrence(forget, inputs)).abs().max()
    assert 0 < error <= 1e-4


def test_state_saturates_and_does_not_wrap():
    forget = torch.full((1, 50, 1), 2**GATE_FRACTION - 1)
    codes = recurrence_fixed(forget, torch.full((1, 50, 1), 2**22))
    assert codes.max() == 2**23 - 1
    assert (codes > 0).all()


def test_norm_is_the_real_one():
    torch.manual_seed(0)
    x, gain = torch.randn(100, 64).double(), torch.rand(64).double() + 0.5
    codes = rms_norm_fixed(to_fixed(x, STATE_FRACTION), to_fixed(gain, STATE_FRACTION))
    error = from_fixed(codes, STATE_FRACTION, torch.float64) - F.rms_norm(x, (64,), gain, 1e-30)
    assert error.abs().max() < 1e-4


def real_output(layer: MLGRU, x: torch.Tensor) -> torch.Tensor:
    """The layer in float64 with ternary weights, its activations not rounded to 8 bits."""

    def project(part, inputs):
        codes, scale = ternary_codes(part.weight)
        return part.norm(inputs) @ (codes * scale).T

    forget = torch.sigmoid(project(layer.f_proj, x))
    h = linear_scan(forget, F.silu(project(layer.i_proj, x)) * (1 - forget))
    return project(layer.o_proj, layer.g_norm(project(layer.g_proj, x)) * F.silu(h))


def test_the_whole_port_is_within_a_thousandth():
    torch.manual_seed(0)
    layer, x = MLGRU(64).double(), torch.randn(2, 128, 64).double()
    want = real_output(layer, x)
    assert (FixedMLGRU(layer)(x) - want).norm() <= 1e-3 * want.norm()
