import numpy as np
import torch

from taut.ops.mean_square import mean_square


def test_equals_numpy_and_keeps_float32_for_half_precision():
    x = torch.randn(4, 33).double()
    np.testing.assert_allclose(mean_square(x).numpy(), np.mean(x.numpy() ** 2, -1, keepdims=True), rtol=1e-14)
    assert mean_square(torch.full((1, 8), 4096.0).half()).item() == 2.0**24
