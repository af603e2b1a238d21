"""Draw a token from logits: greedy, or by temperature, top-k, top-p and min-p, with a stream that the seed fixes.

Source: Salmon, Moraes, Dror and Shaw, Parallel Random Numbers: As Easy as 1, 2, 3, 2011,
https://doi.org/10.1145/2063384.2063405 (Philox4x32-10); top-p: Holtzman et al., 2019, arXiv:1904.09751; min-p: Nguyen
et al., 2024, arXiv:2407.01082; the Gumbel trick: Maddison et al., A* Sampling, 2014, arXiv:1411.0030, section 2.
Differs: Gumbel noise is -log(-log1p(-v)), whose resolution lies where the large values are; drawn in float64.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Int
from torch import Tensor

from taut.op import Reason, Work, nbytes, op
from taut.ops._cpu import refusal

LOW = 0xFFFFFFFF


@op
def sample(
    logits: Float[Tensor, "*batch vocabulary"],
    temperature: float | Tensor = 1.0,
    top_k: int | None = None,
    top_p: float | None = None,
    min_p: float | None = None,
    seed: int | Tensor = 0,
    position: int | Tensor = 0,
) -> Int[Tensor, "*batch"]:
    """Token ids. Temperature 0 takes the greatest logit (the first of equals).

    The filters apply after the temperature, in the order top_k, top_p, min_p, and at least one token remains.
    The noise depends on `seed`, `position` (of the token to be drawn), the row and the token id alone. `temperature`,
    `seed` and `position` are numbers, or tensors with one for every row; rows with seeds of their own do not count
    their place in the batch, so that a request draws the same tokens in any batch.
    """
    if not isinstance(temperature, Tensor) and temperature == 0:
        return logits.argmax(-1)
    rows = logits.reshape(-1, logits.shape[-1]).double()
    heat = torch.as_tensor(temperature, dtype=rows.dtype, device=rows.device).expand(logits.shape[:-1]).reshape(-1, 1)
    scores = rows / torch.where(heat == 0, 1, heat)
    scores = _keep(scores, top_k, top_p, min_p)
    scores = scores + torch.where(heat == 0, 0, _gumbel(logits, seed, position))
    return scores.argmax(-1).reshape(logits.shape[:-1])


def _keep(scores: Tensor, top_k: int | None, top_p: float | None, min_p: float | None) -> Tensor:
    hidden = float("-inf")
    if top_k is not None:
        least = scores.topk(min(top_k, scores.shape[-1])).values[:, -1:]
        scores = scores.masked_fill(scores < least, hidden)
    if top_p is not None:
        ranked, order = scores.softmax(-1).sort(dim=-1, descending=True, stable=True)
        over = ranked.cumsum(-1) - ranked >= top_p
        over[:, 0] = False
        scores = scores.masked_fill(torch.zeros_like(over).scatter(-1, order, over), hidden)
    if min_p is not None and min_p > 0:
        peak = scores.amax(-1, keepdim=True)
        scores = scores.masked_fill((scores - peak).exp() < min_p, hidden)
    return scores


def _gumbel(logits: Tensor, seed: int | Tensor, position: int | Tensor) -> Tensor:
    """Gumbel noise (rows, vocabulary), float64."""
    batch, vocabulary, device = logits.shape[:-1], logits.shape[-1], logits.device
    as_column = lambda n: torch.as_tensor(n, device=device).long().expand(batch).reshape(-1, 1)  # noqa: E731
    key, place = as_column(seed), as_column(position)
    row = torch.zeros_like(key) if isinstance(seed, Tensor) else torch.arange(len(key), device=device)[:, None]
    quad = torch.arange((vocabulary + 3) // 4, device=device)[None]
    words = philox((quad, row, place & LOW, (place >> 32) & LOW), (key & LOW, (key >> 32) & LOW))
    bits = torch.stack(torch.broadcast_tensors(*words), -1).flatten(-2)[:, :vocabulary]
    v = (bits.double() + 0.5) / 2**32
    return -torch.log(-torch.log1p(-v))


def philox(counter: tuple[Tensor, ...], key: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
    """Philox4x32-10: four random 32-bit words for a counter of four and a key of two; all int64 below 2^32."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57
        c0, c1, c2, c3 = ((p1 >> 32) & LOW) ^ c1 ^ k0, p1 & LOW, ((p0 >> 32) & LOW) ^ c3 ^ k1, p0 & LOW
        k0, k1 = (k0 + 0x9E3779B9) & LOW, (k1 + 0xBB67AE85) & LOW
    return c0, c1, c2, c3


@sample.least
def _(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, position=0) -> Work:
    return Work(logits.numel(), nbytes(logits) + logits.numel() // logits.shape[-1] * 8)


@sample.tests
def _(make):
    yield (make(3, 50), 0), {}
    yield (make(3, 50),), {"seed": 2**40 + 3, "position": 7}
    yield (make(50), 0.7, 5), {}
    yield (make(2, 2, 50), 0.7, None, 0.9, 0.05), {"seed": 1, "position": torch.tensor([[1, 2], [3, 4]])}
    yield (make(3, 50), torch.tensor([0.0, 0.5, 2.0])), {"seed": torch.tensor([1, 2, 3])}


def _likeliest(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, position=0) -> Reason:
    if isinstance(temperature, Tensor) or temperature != 0:
        return "a draw, and only the likeliest token is sought so"
    return f"logits are {logits.dtype}" if logits.dtype != torch.float32 else refusal(logits)


@sample.impl("numpy", when=_likeliest, opaque=True)
def _(logits, temperature=1.0, top_k=None, top_p=None, min_p=None, seed=0, position=0):
    """torch looks at one logit after the other, 14 times as slowly."""
    return torch.as_tensor(logits.numpy().argmax(-1))
