"""How much worse a model is than another: perplexity, divergence and noise on given tokens.

Any two models of one vocabulary will do, in memory, rewritten or not: what is compared is their logits, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Quality:
    """A model against another, over all predicted tokens.

    `kl` is the mean of KL(before || after) in nats a token; `sqnr` the power of the logits over that of their error,
    in decibels (infinite where they are equal); `agreement` the share of tokens whose likeliest successor is the same;
    `rise_error` the standard error of the perplexities' ratio over as many tokens.
    """

    perplexity_before: float
    perplexity_after: float
    kl: float
    sqnr: float
    agreement: float
    tokens: int
    rise_error: float = 0.0

    @property
    def perplexity_ratio(self) -> float:
        return self.perplexity_after / self.perplexity_before


def logits_of(model: nn.Module, ids: Tensor) -> Tensor:
    """[batch, length, vocabulary] in float64 for token ids [batch, length].

    Raises ValueError for a model that returns no logits.
    """
    with torch.no_grad():
        out: Any = model(input_ids=ids)
    out = out if isinstance(out, Tensor) else out.get("logits") if hasattr(out, "get") else getattr(out, "logits", None)
    if not isinstance(out, Tensor):
        raise ValueError(f"{type(model).__name__} returns no logits; pass a model with a language modelling head")
    return out.double()


def perplexity(model: nn.Module, batches: Iterable[Tensor]) -> float:
    """exp of the mean loss of every token but the first of each row; `batches` are ids [batch, length].

    Raises ValueError where there is no token to predict.
    """
    loss, count = 0.0, 0
    for ids in batches:
        loss += _loss(logits_of(model, ids), ids)
        count += ids[:, 1:].numel()
    _check(count)
    return math.exp(loss / count)


def compare(before: nn.Module, after: nn.Module, batches: Iterable[Tensor]) -> Quality:
    """Both models on the same ids [batch, length], a batch at a time. Raises ValueError as `perplexity` does."""
    return over((logits_of(before, ids), logits_of(after, ids), ids) for ids in batches)


def over(batches: Iterable[tuple[Tensor, Tensor, Tensor]]) -> Quality:
    """The quality of logits against others' on the same ids: (before, after, ids) of each batch, logits in float64.

    Raises ValueError where there is no token to predict.
    """
    totals = dict.fromkeys(("before", "after", "rise", "squares", "kl", "signal", "noise", "same"), 0.0)
    count = 0
    for one, two, ids in batches:
        losses = [_losses(logits, ids) for logits in (one, two)]
        totals["before"] += losses[0].sum().item()
        totals["after"] += losses[1].sum().item()
        totals["rise"] += (losses[1] - losses[0]).sum().item()
        totals["squares"] += (losses[1] - losses[0]).square().sum().item()
        one, two = one[:, :-1], two[:, :-1]
        p, q = one.log_softmax(-1), two.log_softmax(-1)
        totals["kl"] += (p.exp() * (p - q).nan_to_num()).sum().item()
        totals["signal"] += one.nan_to_num(neginf=0).square().sum().item()
        totals["noise"] += (one - two).nan_to_num().square().sum().item()
        totals["same"] += (one.argmax(-1) == two.argmax(-1)).sum().item()
        count += ids[:, 1:].numel()
    _check(count)
    noise, ratio = totals["noise"], math.exp(totals["rise"] / count)
    spread = max(totals["squares"] / count - (totals["rise"] / count) ** 2, 0.0)
    return Quality(
        perplexity_before=math.exp(totals["before"] / count),
        perplexity_after=math.exp(totals["after"] / count),
        kl=totals["kl"] / count,
        sqnr=10 * math.log10(totals["signal"] / noise) if noise else math.inf,
        agreement=totals["same"] / count,
        tokens=count,
        rise_error=ratio * math.sqrt(spread / count),
    )


def _losses(logits: Tensor, ids: Tensor) -> Tensor:
    return nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), ids[:, 1:].flatten(), reduction="none")


def _loss(logits: Tensor, ids: Tensor) -> float:
    return _losses(logits, ids).sum().item()


def _check(count: int) -> None:
    if count == 0:
        raise ValueError("there is no token to predict: give ids [batch, length] with a length of 2 or more")
