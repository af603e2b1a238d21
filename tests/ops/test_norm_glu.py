import pytest
import torch
import torch.nn.functional as F

from taut.ops.norm_glu import norm_glu


def test_equals_norm_then_gated_feed_forward_in_float64():
    x, gate, up, gain = (torch.randn(*s).double() for s in ((2, 3, 20), (7, 20), (7, 20), (20,)))
    h = F.rms_norm(x, (20,), gain, 1e-3)
    for name, act in (("silu", F.silu), ("gelu", F.gelu), ("relu", F.relu)):
        expected = act(F.linear(h, gate)) * F.linear(h, up)
        torch.testing.assert_close(norm_glu(x, gate, up, gain, 1e-3, name), expected, rtol=1e-12, atol=1e-12)


def test_extreme_gates_stay_finite():
    x, up = torch.full((1, 16), 2.0), torch.ones(6, 16)
    gate = torch.tensor([-1e4, -100.0, -5.0, 5.0, 100.0, 1e4])[:, None].expand(6, 16).contiguous()
    for act in ("silu", "sigmoid", "tanh", "gelu", "gelu_tanh"):
        expected = norm_glu(x.double(), gate.double(), up.double(), act=act).float()
        torch.testing.assert_close(norm_glu(x, gate, up, act=act, impl="numba"), expected)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'abacus'"):
        norm_glu(torch.ones(1, 4), torch.ones(2, 4), torch.ones(2, 4), act="abacus")
