import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from taut.nn.mixer.conformer import BNConv1d, BNLinear, ConformerBlock


class Skip(nn.Module):
    """What stands in a folded norm's place."""

    def forward(self, x, mask=None):
        return x


def folded(block: ConformerBlock) -> ConformerBlock:
    """A copy with every batch norm folded by torch's own tools."""
    block = copy.deepcopy(block)
    for part in block.modules():
        if isinstance(part, BNLinear):
            part.linear, part.norm = fuse_linear_bn_eval(part.linear, part.norm), Skip()
        elif isinstance(part, BNConv1d):
            part.conv, part.norm = fuse_conv_bn_eval(part.conv, part.norm), Skip()
    return block


def ragged(d: int = 32):
    torch.manual_seed(0)
    return torch.randn(3, 20, d).double(), torch.arange(20) < torch.tensor([20, 9, 14])[:, None]


def trained_statistics(d: int = 32) -> ConformerBlock:
    x, mask = ragged(d)
    block = ConformerBlock(d, kernel=7).double()
    for _ in range(5):
        block(x * 2 + 1, mask)
    return block.eval()


def test_every_norm_folds_away():
    block, (x, mask) = trained_statistics(), ragged()
    lean, want = folded(block), block(x, mask)
    assert (lean(x, mask) - want).abs().max() <= 1e-12 * want.abs().max()
    assert not [m for m in lean.modules() if isinstance(m, nn.modules.batchnorm._NormBase)]


@pytest.mark.parametrize("training", [True, False])
def test_padded_frames_do_not_reach_real_ones(training):
    x, mask = ragged()
    block = trained_statistics().train(training)
    other = x.masked_fill(~mask[..., None], 7.0)
    assert torch.equal(copy.deepcopy(block)(other, mask)[mask], copy.deepcopy(block)(x, mask)[mask])


def test_a_shorter_batch_gives_the_same_frames():
    x, mask = ragged()
    block = trained_statistics()
    alone = block(x[1:2, :9])
    torch.testing.assert_close(block(x, mask)[1:2, :9], alone, rtol=1e-12, atol=1e-12)


def test_refuses_a_kernel_that_changes_the_length():
    with pytest.raises(ValueError, match="odd"):
        ConformerBlock(32, kernel=8)


class Recogniser(nn.Module):
    """Frames to symbols: a stack of blocks between two linear layers."""

    def __init__(self, block, d: int = 32, layers: int = 4):
        super().__init__()
        self.enter, self.leave = nn.Linear(8, d), nn.Linear(d, 6)
        self.blocks = nn.ModuleList(block() for _ in range(layers))

    def forward(self, x, mask):
        x = self.enter(x)
        for block in self.blocks:
            x = block(x, mask)
        return self.leave(x).log_softmax(-1)


def spoken(batch: int, generator: torch.Generator):
    """Words of 4 symbols out of 5, each symbol a noisy pattern that lasts 3 to 6 frames."""
    patterns = torch.randn(5, 8, generator=torch.Generator().manual_seed(1))
    words = torch.randint(5, (batch, 4), generator=generator)
    lengths = torch.randint(3, 7, (batch, 4), generator=generator)
    x = torch.zeros(batch, 24, 8)
    for row, (word, length) in enumerate(zip(words, lengths, strict=True)):
        frames = patterns[word].repeat_interleave(length, 0)
        x[row, : len(frames)] = frames
    x += 0.5 * torch.randn(x.shape, generator=generator)
    return x, lengths.sum(1), words


class Plain(nn.Module):
    """The Conformer block as it was: a norm in front of each part, Swish and GLU."""

    def __init__(self, norm, d: int = 32):
        super().__init__()
        self.norms = nn.ModuleList(norm(d) for _ in range(5))
        self.feeds = nn.ModuleList(nn.Sequential(nn.Linear(d, 4 * d), nn.SiLU(), nn.Linear(4 * d, d)) for _ in range(2))
        self.attention = nn.MultiheadAttention(d, 4, batch_first=True)
        self.enter, self.leave = nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.depthwise = nn.Conv1d(d, d, 7, padding=3, groups=d)

    def forward(self, x, mask):
        x = x + 0.5 * self.feeds[0](self.norms[0](x))
        y = self.norms[1](x)
        x = x + self.attention(y, y, y, key_padding_mask=~mask, need_weights=False)[0]
        y = F.glu(self.enter(self.norms[2](x)), -1).masked_fill(~mask[..., None], 0.0)
        x = x + self.leave(F.silu(self.norms[3](self.depthwise(y.mT).mT)))
        return x + 0.5 * self.feeds[1](self.norms[4](x))


class InPlace(nn.BatchNorm1d):
    """A batch norm where a layer norm was."""

    def forward(self, x):
        return super().forward(x.mT).mT


KINDS = {
    "folding": lambda: ConformerBlock(32, kernel=7),
    "layer norms": lambda: Plain(nn.LayerNorm),
    "batch norms in their place": lambda: Plain(InPlace),
}


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("seed", range(3))
def test_a_small_recogniser_trains(seed: int, kind: str):
    """With batch norms put in place of layer norms too: at this size they do not diverge, as the paper's model did."""
    torch.manual_seed(seed)
    generator, model = torch.Generator().manual_seed(seed), Recogniser(KINDS[kind])
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(150):
        x, lengths, words = spoken(32, generator)
        log_p = model(x, torch.arange(24) < lengths[:, None])
        loss = F.ctc_loss(log_p.transpose(0, 1), words + 1, lengths, torch.full_like(lengths, 4), zero_infinity=True)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-10:]) / 10 < 0.1 * losses[0]
