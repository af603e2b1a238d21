import math

import torch

from taut.ops.dyt import dyt


def test_is_tanh_with_gain_and_bias():
    x = torch.tensor([[0.0, 1.0, -2.0]]).double()
    y = dyt(x, 0.5, torch.tensor([1.0, 2.0, 3.0]), torch.tensor([0.1, 0.2, 0.3]).double())
    expected = [0.1, 2 * math.tanh(0.5) + 0.2, 3 * math.tanh(-1.0) + 0.3]
    torch.testing.assert_close(y, torch.tensor([expected]).double())
