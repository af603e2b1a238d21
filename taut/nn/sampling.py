"""Exact sampling from a language model's head without its row of logits: a running maximum of noisy logits.

Source: Ruiz, Qin, Zhang, Shen, Zhong and Wang, FlashSampling, 2026, arXiv:2603.15854; noise by Salmon et al., Parallel
    Random Numbers: As Easy as 1, 2, 3, 2011 (https://doi.org/10.1145/2063384.2063405).
Differs: the Gumbel noise is -log(-log1p(-v)) with v uniform and fine near 0. The usual -log(-log(u)) in float32 takes u
    near 1, where it has steps of 2^-24: it ties 0.4 % of the maxima over 152,000 flat logits (this one 0.002 %) and
    starves tokens less likely than 6e-8. Temperature is one number a row, so that a final norm can pass its scalar as
    one. The noise of a token depends on the seed, its row and its index alone, not on the tile.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from taut.ops import _gpu
from taut.ops.inv_rms import inv_rms

WORD = 0xFFFFFFFF
MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
KEY_STEPS = (0x9E3779B9, 0xBB67AE85)
MOST_KEPT = 1024
"""The greatest k that the GPU kernels take."""


class Sample(NamedTuple):
    """`ids`: int64 [batch]. `log_z`: float32 [batch], log of the sum of exp over the logits that took part."""

    ids: Tensor
    log_z: Tensor


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[int, int]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four int64 tensors of 32-bit counter words to four of random 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        # int64 products wrap, but their 64 bits are those of the unsigned product
        p0, p1 = c0 * MULTIPLIERS[0], c2 * MULTIPLIERS[1]
        high0, high1 = (p0 >> 32) & WORD, (p1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & WORD, high0 ^ c3 ^ k1, p0 & WORD
        k0, k1 = (k0 + KEY_STEPS[0]) & WORD, (k1 + KEY_STEPS[1]) & WORD
    return c0, c1, c2, c3


def random_words(
    seed: int, rows: int, start: int, stop: int, step: int = 0, device: torch.device | None = None
) -> Tensor:
    """32 random bits, int64 [rows, stop - start], for the tokens from `start` on: word token % 4 of Philox at counter
    (token / 4, row, step, 0), the key being the two halves of the 64-bit seed."""
    groups = torch.arange(start // 4, (stop + 3) // 4, device=device)
    low, high = torch.broadcast_tensors(groups, torch.arange(rows, device=device)[:, None])
    counter = (low, high, torch.full_like(low, step & WORD), torch.zeros_like(low))
    words = philox(counter, (seed & WORD, (seed >> 32) & WORD))
    return torch.stack(words, -1).flatten(1)[:, start % 4 : start % 4 + stop - start]


def gumbel(words: Tensor) -> Tensor:
    """Standard Gumbel noise, float32, from 32 random bits each: between -3.2 and 22.9.

    In float64 until the last rounding: float32 logarithms differ between vector lanes and machines.
    """
    return (-torch.log(-torch.log1p(-(words.double() + 0.5) * 2.0**-32))).float()


def sample_lm_head(
    h: Tensor,
    weight: Tensor,
    temperature: Tensor | float = 1.0,
    mask: Tensor | None = None,
    seed: int = 0,
    k: int | None = None,
    *,
    step: int = 0,
    tile: int = 4096,
    eps: float | None = None,
) -> Sample:
    """Draw a token for each row from softmax(h weight^T / temperature), `tile` tokens of the vocabulary at a time.

    h: [batch, d]; weight: [vocab, d]; temperature: a number or [batch], where 0 means the most likely token; mask: bool
    [vocab] or [batch, vocab], True where a token is allowed; k: keep the k most likely only (the lower index first
    among equals); eps: draw from the logits of rms_norm(h, eps=eps), the model's final norm, whose gain is in the
    weight: its scalar is one more temperature a row. The same seed and step (say, the position) give the same ids for
    every `tile`. On a GPU with Triton, 16-bit inputs take kernels whose logits are summed in float32, unless k is above
    1024. Raises ValueError for a negative temperature, for k below 1 and where a row allows no token.
    """
    batch, vocab = h.shape[0], weight.shape[0]
    temperature = torch.as_tensor(temperature, dtype=torch.float32, device=h.device).expand(batch)
    mask = None if mask is None else mask.expand(batch, vocab)
    _check(temperature, mask, k)
    if (k or 1) <= MOST_KEPT and _gpu.refuses_product(h, (weight,), (), mask) is None:
        signed = (seed & 2**64 - 1) - (seed & 2**63) * 2
        key = torch.tensor([signed, step & WORD], device=h.device)
        draw = _gpu.kernel("launch", "sample_lm_head")
        return Sample(*draw(h, weight, temperature.contiguous(), key, mask, eps, top_k=k))
    h = h if eps is None else h.double() * inv_rms.reference(h.double(), eps)
    tiles = _tiles(h, weight, temperature, mask, (seed, step), tile)
    return _running_best(tiles) if k is None else _running_top(tiles, k)


def _tiles(
    h: Tensor, weight: Tensor, temperature: Tensor, mask: Tensor | None, noise_key: tuple[int, int], tile: int
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """(logits, noisy logits, ids), [batch, at most tile] each, of one stretch of the vocabulary after the other.

    Products are summed in float64, so that after rounding they do not depend on the tile.
    """
    (seed, step), random = noise_key, (temperature > 0)[:, None]
    scale = torch.where(random, temperature[:, None], 1.0)
    for start in range(0, len(weight), tile):
        stop = min(start + tile, len(weight))
        logits = (h.double() @ weight[start:stop].double().T).float() / scale
        if mask is not None:
            logits = logits.masked_fill(~mask[:, start:stop], -torch.inf)
        noise = gumbel(random_words(seed, len(h), start, stop, step, h.device))
        ids = torch.arange(start, stop, device=h.device).expand(len(h), -1)
        yield logits, logits + torch.where(random, noise, 0.0), ids


def _running_best(tiles: Iterator[tuple[Tensor, Tensor, Tensor]]) -> Sample:
    """The id of the largest noisy logit of each row, the lowest one among equals."""
    logits, noisy, ids = next(tiles)
    best, winner, log_z = *_first_largest(noisy, ids), logits.double().logsumexp(-1)
    for logits, noisy, ids in tiles:
        value, at = _first_largest(noisy, ids)
        winner, best = torch.where(value > best, at, winner), torch.maximum(value, best)
        log_z = torch.logaddexp(log_z, logits.double().logsumexp(-1))
    return Sample(winner, log_z.float())


def _running_top(tiles: Iterator[tuple[Tensor, Tensor, Tensor]], k: int) -> Sample:
    """The same among the k largest logits only, the lower id being kept among equals."""
    kept = _largest(next(tiles), k)
    for tile in tiles:
        # ids kept so far are lower than those to come, and a stable sort leaves them first
        joined = (torch.cat(pair, 1) for pair in zip(kept, tile, strict=True))
        kept = _largest(tuple(joined), k)
    logits, noisy, ids = kept
    return Sample(_first_largest(noisy, ids)[1], logits.double().logsumexp(-1).float())


def _largest(tile: tuple[Tensor, ...], k: int) -> tuple[Tensor, ...]:
    order = torch.sort(tile[0], dim=-1, descending=True, stable=True).indices[:, :k]
    return tuple(part.gather(-1, order) for part in tile)


def _first_largest(noisy: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    value = noisy.amax(-1)
    tied = torch.where(noisy == value[:, None], ids, torch.iinfo(torch.int64).max)
    return value, tied.amin(-1)


def _check(temperature: Tensor, mask: Tensor | None, k: int | None) -> None:
    if (temperature < 0).any():
        raise ValueError("a temperature is negative; 0 means the most likely token")
    if k is not None and k < 1:
        raise ValueError(f"k={k} keeps no token; it must be at least 1")
    if mask is not None and not mask.any(-1).all():
        raise ValueError("a row's mask allows no token; allow at least one")


def merge_samples(first: Sample, second: Sample, uniform: Tensor) -> Sample:
    """Join draws from two disjoint groups of tokens into one from both: the second wins with its share of the total,
    1 / (1 + exp(log_z1 - log_z2)). `uniform` [batch] in [0, 1) is independent of both draws."""
    wins = uniform < torch.sigmoid(second.log_z - first.log_z)
    return Sample(torch.where(wins, second.ids, first.ids), torch.logaddexp(first.log_z, second.log_z))
