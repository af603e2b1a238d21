"""A Conformer block whose norms all fold away: a batch norm behind every linear layer, ReLU for Swish and GLU.

Source: Song et al., FusionFormer: Fusing Operations in Transformer for Efficient Streaming Speech Recognition, 2022,
    arXiv:2210.17079; the block is that of Gulati et al., Conformer, 2020, arXiv:2005.08100.
Differs: padded frames do not enter the statistics; the pointwise convolution that fed the GLU keeps the block's width
    now that there is no gate; attention has no relative positions.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from taut.nn.norm.masked_batch_norm import MaskedBatchNorm


class BNLinear(nn.Module):
    """A linear layer and the batch norm that folds into it: x [batch, T, d_in] to [batch, T, d_out]."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.linear, self.norm = nn.Linear(d_in, d_out), MaskedBatchNorm(d_out)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.linear(x).transpose(1, 2), mask).transpose(1, 2)


class BNConv1d(nn.Module):
    """A depthwise convolution over time that keeps the length, and its batch norm: x [batch, T, d]."""

    def __init__(self, d: int, kernel: int) -> None:
        super().__init__()
        self.conv, self.norm = nn.Conv1d(d, d, kernel, padding=kernel // 2, groups=d), MaskedBatchNorm(d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.norm(self.conv(x.transpose(1, 2)), mask).transpose(1, 2)


class FeedForward(nn.Module):
    def __init__(self, d: int, hidden: int) -> None:
        super().__init__()
        self.up, self.down = BNLinear(d, hidden), BNLinear(hidden, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.down(F.relu(self.up(x, mask)), mask)


class Attention(nn.Module):
    """Self-attention of every frame to the real ones."""

    def __init__(self, d: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv, self.out = BNLinear(d, 3 * d), BNLinear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x, mask).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        real = None if mask is None else mask[:, None, None, :]
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=real)
        return self.out(mixed.transpose(1, 2).flatten(2), mask)


class Convolution(nn.Module):
    """Pointwise, depthwise over time, pointwise; the depthwise one sees zeros in place of padded frames."""

    def __init__(self, d: int, kernel: int) -> None:
        super().__init__()
        self.enter, self.depthwise, self.leave = BNLinear(d, d), BNConv1d(d, kernel), BNLinear(d, d)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        h = F.relu(self.enter(x, mask))
        if mask is not None:
            h = h.masked_fill(~mask[..., None], 0.0)
        return self.leave(F.relu(self.depthwise(h, mask)), mask)


class ConformerBlock(nn.Module):
    """Half a feed-forward, attention, convolution, half a feed-forward, each added to x [batch, T, d].

    `mask`: bool [batch, T], True where a frame is real. `kernel` is odd. What padded frames hold has no influence on
    real ones, in training as in evaluation.
    """

    def __init__(self, d: int, heads: int = 4, kernel: int = 15, hidden: int | None = None) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"a kernel of {kernel} frames changes the length; take an odd one")
        self.first, self.second = FeedForward(d, hidden or 4 * d), FeedForward(d, hidden or 4 * d)
        self.attention, self.convolution = Attention(d, heads), Convolution(d, kernel)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        x = x + 0.5 * self.first(x, mask)
        x = x + self.attention(x, mask)
        x = x + self.convolution(x, mask)
        return x + 0.5 * self.second(x, mask)
