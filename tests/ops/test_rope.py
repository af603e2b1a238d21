import torch
from transformers.models.cohere.modeling_cohere import apply_rotary_pos_emb as interleaved_rope
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb as half_rope

from taut.ops.rope import rope


def angles(length: int, half: int) -> torch.Tensor:
    return torch.arange(length)[:, None] * 10000 ** (-torch.arange(half) / half)


def test_equals_transformers():
    q, k = torch.randn(2, 4, 6, 16), torch.randn(2, 2, 6, 16)
    a = torch.cat((angles(6, 8), angles(6, 8)), -1)[None]
    for x, expected in zip((q, k), half_rope(q, k, a.cos(), a.sin()), strict=True):
        torch.testing.assert_close(rope(x, a.cos(), a.sin()), expected)
    a = angles(6, 8).repeat_interleave(2, -1)[None]
    for x, expected in zip((q, k), interleaved_rope(q, k, a.cos(), a.sin()), strict=True):
        torch.testing.assert_close(rope(x, a.cos(), a.sin(), interleaved=True), expected)


def test_features_behind_the_rotary_ones_pass_unchanged():
    x, a = torch.randn(1, 2, 6, 20), torch.cat((angles(6, 4), angles(6, 4)), -1)
    y = rope(x, a.cos(), a.sin())
    assert torch.equal(y[..., 8:], x[..., 8:])
    torch.testing.assert_close(y[..., :8], rope(x[..., :8], a.cos(), a.sin()))
    torch.testing.assert_close(y.norm(dim=-1), x.norm(dim=-1))
