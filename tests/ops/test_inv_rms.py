import numpy as np
import torch

from taut.ops.inv_rms import inv_rms


def test_equals_numpy_and_keeps_float32_for_half_precision():
    x = torch.randn(4, 33)
    expected = 1 / np.sqrt(np.mean(x.double().numpy() ** 2, -1, keepdims=True) + 1e-3)
    np.testing.assert_allclose(inv_rms(x.double(), 1e-3).numpy(), expected, rtol=1e-14)
    assert inv_rms(x.half()).dtype == torch.float32
    assert inv_rms(torch.full((1, 8), 6e4).half()).isfinite().all()
