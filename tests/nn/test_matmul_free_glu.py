import torch
import torch.nn.functional as F

from taut.nn.ffn.matmul_free_glu import MatMulFreeGLU


def test_inner_width_is_a_multiple_of_256():
    assert [MatMulFreeGLU(d).down.weight.shape[1] for d in (96, 97, 1024)] == [256, 512, 2816]


def test_is_a_gated_feed_forward():
    torch.manual_seed(0)
    block, x = MatMulFreeGLU(32, 64), torch.randn(2, 5, 32)
    both = block.gate_up(x)
    assert torch.equal(block(x), block.down(F.silu(both[..., :64]) * both[..., 64:]))
