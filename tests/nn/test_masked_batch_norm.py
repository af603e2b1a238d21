import pytest
import torch
from torch import nn

from taut.nn.norm.masked_batch_norm import MaskedBatchNorm


def ragged():
    """Sequences of 9, 4 and 6 frames, padded to 9."""
    torch.manual_seed(0)
    x = torch.randn(3, 5, 9).double()
    return x, torch.arange(9) < torch.tensor([9, 4, 6])[:, None]


def test_is_a_batch_norm_over_the_real_frames():
    x, mask = ragged()
    ours, theirs = MaskedBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    for _ in range(3):
        got = ours(x, mask)
        want = theirs(x.transpose(1, 2)[mask])
        torch.testing.assert_close(got.transpose(1, 2)[mask], want, rtol=1e-12, atol=1e-12)
    for name, value in theirs.state_dict().items():
        torch.testing.assert_close(ours.state_dict()[name], value, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("padding", [0.0, 1e30, torch.nan, torch.inf])
def test_padding_does_not_move_a_bit(padding):
    x, mask = ragged()
    other = x.masked_fill(~mask[:, None], padding)
    first, second = MaskedBatchNorm(5).double(), MaskedBatchNorm(5).double()
    got, want = first(other, mask), second(x, mask)
    assert torch.equal(got.transpose(1, 2)[mask], want.transpose(1, 2)[mask])
    assert all(torch.equal(a, b) for a, b in zip(first.buffers(), second.buffers(), strict=True))


def test_without_a_mask_or_in_evaluation_it_is_torch_s():
    x, mask = ragged()
    norm, theirs = MaskedBatchNorm(5).double(), nn.BatchNorm1d(5).double()
    assert torch.equal(norm(x), theirs(x))
    assert torch.equal(norm.eval()(x, mask), theirs.eval()(x))


def test_refuses_a_mask_with_nothing_to_measure():
    with pytest.raises(ValueError, match="2 real frames"):
        MaskedBatchNorm(5)(torch.randn(2, 5, 3), torch.zeros(2, 3, dtype=torch.bool))
