"""Is a runtime still the same model: each step's logits against float64, on the same tokens.

The original is transformers' own model in its own dtype. It continues a prompt greedily; the runtime is fed the same
tokens. ALGEBRAIC: at each step the runtime's error against true float64 is at most twice the original's, plus one
unit in the last place. BOUNDED: both are fed a text, and what the rewrite of that name promises (`taut.rewrite.Bound`)
must hold: it diverges from the original at most twice as far as noise of its accuracy does, and where a perplexity is
promised it rises by no more, give or take chance.
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
from taut.lossy import CHANCE
from taut.quality import Quality, over
from taut.rewrite import rewrites

TIMES = 2
EXCUSED = 1000
"""At most one step in so many may choose another token, and only where float64 itself is undecided."""


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

    `worst` is the runtime's error over the original's, or its divergence over that of noise; None where it is no
    number. `rise` is that of the perplexity of a lossy runtime, as a part of it, with its standard error.
    """

    passed: bool
    promise: str
    steps: int
    worst: float | None
    limit: float
    differing: int = 0
    excused: list[Excuse] = field(default_factory=list)
    reason: str = ""
    divergence: float | None = None
    rise: float | None = None
    standard_error: float | None = None

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
    """A copy on the CPU: a runner may write the next step's logits over the last one's."""
    return logits.to("cpu", torch.float64, copy=True)


@torch.no_grad()
def in_float64(model: nn.Module, prompt: Sequence[int], tokens: Sequence[int]) -> Tensor:
    """The same logits in true float64, on the CPU: parameters and casts widened, one forward pass without a cache, on
    the device that the model is on."""
    wide: Any = copy.deepcopy(model).double()
    for module in wide.modules():
        config = getattr(module, "config", None)
        if config is not None and hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    ids = torch.tensor([[*prompt, *tokens[:-1]]], device=next(model.parameters()).device)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    try:
        with Float64():
            logits = wide(input_ids=ids, use_cache=False).logits
    finally:
        torch.set_default_dtype(default)
    return logits[0, len(prompt) - 1 :].cpu()


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


def bounded(name: str, original: Tensor, found: Tensor, noisy: Sequence[Tensor], tokens: Sequence[int]) -> Parity:
    """What the lossy rewrite `name` promises, on a text each token of which was fed to all.

    `noisy` are the logits of the original with random noise of the rewrite's accuracy, one for each draw.
    """
    limit = rewrites()[name].bound.perplexity  # type: ignore[union-attr]
    quality, drawn = _over(original, found, tokens), [_over(original, one, tokens).kl for one in noisy]
    times, rise = quality.kl / (sum(drawn) / len(drawn) or math.nan), quality.perplexity_ratio - 1
    reasons = [] if times <= TIMES else [f"it diverges {times:.2f} times as far as noise of its accuracy"]
    if limit is not None and not rise - CHANCE * quality.rise_error <= limit:
        reasons.append(f"perplexity {rise:+.2%}, give or take {quality.rise_error:.2%}, promised were {limit:.1%}")
    result = Parity(not reasons, f"BOUNDED by {name}", len(tokens), _finite(times), TIMES, reason="; ".join(reasons))
    result.divergence, result.rise, result.standard_error = quality.kl, _finite(rise), _finite(quality.rise_error)
    return result


def _over(original: Tensor, found: Tensor, tokens: Sequence[int]) -> Quality:
    """Row i of the logits is behind the token before `tokens[i]`."""
    ids = torch.tensor([[0, *tokens]])
    padded = [torch.cat((logits.double(), logits[-1:].double()))[None] for logits in (original, found)]
    return over([(padded[0], padded[1], ids)])


def _finite(number: Tensor | float) -> float | None:
    return float(number) if math.isfinite(number) else None
