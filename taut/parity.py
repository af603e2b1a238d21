"""Is a runtime still the same model: each step's logits against float64, on the same tokens.

The original is transformers' own model in its own dtype. It continues a prompt greedily; the runtime is fed the same
tokens. ALGEBRAIC: at each step the runtime's error against true float64 is at most twice the original's, plus one
unit in the last place. BOUNDED: the perplexity of a text rises by no more than the bound.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from taut.graph import Float64

TIMES = 2
EXCUSED = 1000
"""At most one step in so many may choose another token, and only where float64 itself is undecided."""
BOUNDS = {"int8": 0.005, "int4": 0.10}
"""By how much, as a part of it, quantized weights may raise the perplexity."""


class Runner(Protocol):
    """One sequence: both calls return the logits (vocabulary,) behind the last token fed."""

    def prefill(self, ids: Sequence[int]) -> Tensor: ...
    def step(self, token: int) -> Tensor: ...


@dataclass
class Excuse:
    """A step at which another token was chosen: its margin in float64, and the original's own error there."""

    step: int
    margin: float
    error: float


@dataclass
class Parity:
    """The verdict, and what it stands on.

    `worst` is the runtime's error over the original's, or the bounded rise; None where it is no number.
    """

    passed: bool
    promise: str
    steps: int
    worst: float | None
    limit: float
    differing: int = 0
    excused: list[Excuse] = field(default_factory=list)
    reason: str = ""

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@torch.no_grad()
def greedy(runner: Runner, prompt: Sequence[int], steps: int) -> tuple[list[int], Tensor]:
    """The tokens that a runner chooses behind a prompt, and the logits (steps, vocabulary) it chose them by."""
    logits = [_kept(runner.prefill(prompt))]
    tokens = [int(logits[0].argmax())]
    while len(tokens) < steps:
        logits.append(_kept(runner.step(tokens[-1])))
        tokens.append(int(logits[-1].argmax()))
    return tokens, torch.stack(logits)


@torch.no_grad()
def forced(runner: Runner, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The logits (len(tokens), vocabulary) by which a runner would choose each of the tokens."""
    return torch.stack([_kept(runner.prefill(prompt)), *(_kept(runner.step(token)) for token in tokens[:-1])])


def _kept(logits: Tensor) -> Tensor:
    """A copy: a runner may write the next step's logits over the last one's."""
    return logits.to(torch.float64, copy=True)


@torch.no_grad()
def in_float64(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The same logits in true float64: parameters and casts widened, one forward pass without a cache."""
    wide: Any = copy.deepcopy(model).double()
    for module in wide.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    ids = torch.tensor([[*prompt, *tokens[:-1]]])
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            logits = wide(input_ids=ids, use_cache=False).logits
    finally:
        torch.set_default_dtype(default)
    return logits[0, len(prompt) - 1 :]


def same_function(
    original: Tensor, found: Tensor, exact: Tensor, dtype: torch.dtype, tokens: Sequence[int] | None = None
) -> Parity:
    """The 2x rule at every step; with the `tokens` that the original chose (float32), the choices too."""
    theirs, ours = ((logits - exact).norm(dim=-1) / exact.norm(dim=-1) for logits in (original, found))
    ratio = ours / (theirs + torch.finfo(dtype).eps / TIMES)
    at = int(ratio.nan_to_num(nan=math.inf).argmax())
    result = Parity(bool((ratio <= TIMES).all()), "ALGEBRAIC", len(exact), _finite(ratio[at]), TIMES)
    if not result.passed:
        result.reason = f"step {at}: error {float(ours[at]):.1e} against transformers' {float(theirs[at]):.1e}"
    if tokens is not None:
        _compare_choices(result, original, found, exact, tokens)
    return result


def _compare_choices(result: Parity, original: Tensor, found: Tensor, exact: Tensor, tokens: Sequence[int]) -> None:
    chosen = found.argmax(-1)
    for step in (chosen != torch.tensor(tokens)).nonzero().flatten().tolist():
        best = exact[step].topk(2).values
        margin, error = float(best[0] - best[1]), float((original[step] - exact[step]).abs().max())
        if margin < error:
            result.excused.append(Excuse(step, margin, error))
        else:
            result.differing += 1
    if result.differing or len(result.excused) * EXCUSED > len(tokens):
        result.passed = False
        said = f"{result.differing} tokens differ, and {len(result.excused)} more where float64 is undecided"
        result.reason = "; ".join(filter(None, (result.reason, said)))


def bounded(weights: str, original: Tensor, found: Tensor, tokens: Sequence[int]) -> Parity:
    """The rise of the perplexity of a text, each token of which was fed to both."""
    before, after = (_perplexity(logits, tokens) for logits in (original, found))
    rise, limit = after / before - 1, BOUNDS[weights]
    reason = "" if rise <= limit else f"perplexity {after:.4f} against {before:.4f}"
    return Parity(
        rise <= limit, f"BOUNDED: perplexity within {limit:.1%}", len(tokens), _finite(rise), limit, reason=reason
    )


def _finite(number: Tensor | float) -> float | None:
    return float(number) if math.isfinite(number) else None


def _perplexity(logits: Tensor, tokens: Sequence[int]) -> float:
    loss = nn.functional.cross_entropy(logits, torch.tensor(tokens))
    return float(loss.exp())
