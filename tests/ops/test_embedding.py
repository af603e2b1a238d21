import pytest
import torch

from taut.ops.embedding import embedding


def test_takes_rows_and_refuses_ids_outside():
    weight = torch.randn(10, 4)
    ids = torch.tensor([[0, 9], [3, 3]])
    assert torch.equal(embedding(ids, weight), weight[ids])
    with pytest.raises(IndexError):
        embedding(torch.tensor([10]), weight)
