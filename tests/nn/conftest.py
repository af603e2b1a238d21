import pytest
from torch import nn

from .char_lm import CharLM, train


@pytest.fixture(scope="session")
def layer_norm_lm() -> CharLM:
    """A small trained character model with layer norms."""
    return train(nn.LayerNorm)
