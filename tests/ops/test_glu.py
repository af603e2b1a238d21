import pytest
import torch
import torch.nn.functional as F

from taut.ops.glu import glu


def test_equals_torch():
    gate, up = torch.randn(3, 8).double(), torch.randn(3, 8).double()
    acts = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu, "sigmoid": torch.sigmoid, "tanh": torch.tanh}
    acts |= {"gelu_tanh": lambda x: F.gelu(x, approximate="tanh"), "relu2": lambda x: F.relu(x) ** 2}
    for name, act in (acts | {"identity": lambda x: x}).items():
        torch.testing.assert_close(glu(gate, up, name), act(gate) * up, rtol=1e-14, atol=1e-14)
    torch.testing.assert_close(glu(gate, up, "sigmoid"), F.glu(torch.cat((up, gate), -1)), rtol=1e-14, atol=1e-14)


def test_an_unknown_activation_is_refused():
    with pytest.raises(ValueError, match="unknown activation 'abacus'"):
        glu(torch.ones(1), torch.ones(1), "abacus")
