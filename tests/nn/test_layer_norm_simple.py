import torch
import torch.nn.functional as F

from taut.nn.norm.layer_norm_simple import LayerNormSimple


def test_is_layer_norm_without_parameters():
    x = torch.randn(8, 64)
    assert torch.equal(LayerNormSimple(64)(x), F.layer_norm(x, (64,)))
    assert not list(LayerNormSimple(64).parameters())
