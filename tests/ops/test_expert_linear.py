import pytest
import torch
import torch.nn.functional as F

from taut.ops.expert_linear import expert_linear


def test_equals_a_loop_over_tokens():
    x, weight = torch.randn(9, 6).double(), torch.randn(4, 6, 5).double()
    offsets = torch.tensor([2, 2, 8, 9], dtype=torch.int32)
    experts = [0, 0, 2, 2, 2, 2, 2, 2, 3]
    expected = torch.stack([x[t] @ weight[e] for t, e in enumerate(experts)])
    torch.testing.assert_close(expert_linear(x, weight, offsets), expected, rtol=1e-14, atol=1e-14)


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="this torch has no public grouped_mm")
def test_equals_torch():
    x, weight = torch.randn(16, 32).bfloat16(), torch.randn(3, 32, 16).bfloat16()
    offsets = torch.tensor([4, 12, 16], dtype=torch.int32)
    torch.testing.assert_close(expert_linear(x, weight, offsets), F.grouped_mm(x, weight, offs=offsets))
