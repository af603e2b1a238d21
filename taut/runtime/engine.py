"""A compiled model: prompts go into slots; a decoding step takes one token of each sequence, at its own position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from taut.checkpoint.errors import BadInput
from taut.runtime.placed import dtype_of, gpu
from taut.runtime.prompt import PromptRunner
from taut.runtime.runner import Runner, check_window
from taut.runtime.sampling import Ints, Sampling
from taut.runtime.steps import Program, Torch

if TYPE_CHECKING:
    from taut.runtime.cuda import CudaRunner
    from taut.runtime.plain import PlainRunner

CHUNK = 512
"""Tokens of a prompt that are run at once."""

FEW = 4
"""Up to as many tokens run one by one at the least; beyond that torch's products, which read a weight once, may pay."""
START, STEP, RATE = 1e-4, 2e-6, 6e10
"""Seconds that torch takes to begin a step of a prompt and the interpreter one of a token; bytes it reads a second."""


class Engine:
    """A program with its caches. `lengths[slot]` tokens stand in a slot.

    Attributes: `program`, `max_length` (positions a slot), `max_batch` (slots), `stop` (tokens that end a text),
    `device` (where the caches are, and the logits).
    """

    def __init__(
        self,
        program: Program,
        max_batch: int = 1,
        cache_dtype: torch.dtype | None = None,
        stop: Iterable[int] = (),
        device: str = "cpu",
    ) -> None:
        self.program, self.max_length, self.max_batch = program, program.max_length, max_batch
        self.runner, self.many = _runners(program, max_batch, cache_dtype, device)
        self.device = self.many.caches[0][0].device
        self.lengths = [0] * max_batch
        self.stop = frozenset(stop)
        self.few = _few(program, self.runner.bytes_a_token([0])) if device == "cpu" else FEW

    def prefill(self, ids: Ints, slot: int = 0) -> Tensor:
        """Append tokens to the sequence in a slot; float32 logits (vocabulary,) after the last of them.

        Raises BadInput for an empty prompt, ids that the model does not know, and where the slot has no room.
        """
        tokens = self._checked(ids, slot)
        start = self.lengths[slot]
        logits = None
        for piece in tokens.split(CHUNK):
            positions = torch.arange(start, start + len(piece))
            logits = self._run(piece, positions, torch.full_like(piece, slot))
            start += len(piece)
        self.lengths[slot] = start
        assert logits is not None
        return logits

    def _run(self, tokens: Tensor, positions: Tensor, slots: Tensor) -> Tensor:
        """The last row's logits."""
        if len(tokens) > self.few:
            given = (t.to(self.device) for t in (tokens, positions, slots, torch.tensor([len(tokens) - 1])))
            return self.many.run(*given)[-1].float()
        for i in range(len(tokens) - 1):
            self.runner.run(tokens[i : i + 1], positions[i : i + 1], slots[i : i + 1])
        return self.runner.run(tokens[-1:], positions[-1:], slots[-1:])[-1].clone()

    def decode(self, tokens: Ints, slots: Sequence[int] | None = None) -> Tensor:
        """Append one token to each of some slots (0, 1, ... by default); float32 logits (rows, vocabulary).

        The next call overwrites them. Raises BadInput for ids out of range and slots that are full or given twice.
        """
        rows = self._rows(_long(tokens).tolist(), list(range(len(tokens))) if slots is None else list(slots))
        logits = self.runner.run(*rows)
        self._grow(rows[2])
        return logits

    def _follow(self, tokens: list[int], slots: list[int], how: Sampling) -> list[int]:
        """The same, and a token drawn for each row."""
        rows = self._rows(tokens, slots)
        drawn = self.runner.draw(*rows, how)
        self._grow(slots)
        return drawn

    def _rows(self, tokens: list[int], slots: list[int]) -> tuple[list[int], list[int], list[int]]:
        """Tokens, positions and slots of a step.

        Lists, for which nothing of torch must come into a cache that holds weights.
        """
        if len(tokens) > self.max_batch or len(tokens) != len(slots) or len(set(slots)) < len(slots):
            cause = f"{len(tokens)} tokens for slots {slots}, where {self.max_batch} slots are"
            raise BadInput(cause, "give each slot one token, or compile with a larger max_batch")
        for token, slot in zip(tokens, slots, strict=True):
            self._check_slot(slot)
            self._check_room(token, token, 1, slot)
        return tokens, [self.lengths[slot] for slot in slots], slots

    def _grow(self, slots: list[int]) -> None:
        for slot in slots:
            self.lengths[slot] += 1

    def reset(self, slot: int | None = None) -> None:
        """Forget the sequence in a slot, or in all of them."""
        for place in range(self.max_batch) if slot is None else [slot]:
            self.lengths[place] = 0

    def generate(
        self,
        ids: Ints | Sequence[Ints],
        max_new_tokens: int = 128,
        temperature: float = 0.0,
        top_k: int | None = None,
        top_p: float | None = None,
        min_p: float | None = None,
        seed: int = 0,
        stop: Iterable[int] | None = None,
    ) -> Iterator:
        """Yield the tokens that follow a prompt, one by one; for a list of prompts a list at every step.

        In such a list stands None for a prompt whose text has ended. A text ends at a token in `stop` (by default the
        model's own, which is not yielded), after `max_new_tokens`, or where the slot is full. Prompts may differ in
        length; prompt i draws from the stream of `seed + i`. Raises BadInput before anything is computed.
        """
        single = ids.ndim == 1 if isinstance(ids, Tensor) else not _is_batch(ids)
        prompts: list[Ints] = [ids] if single else list(ids)  # type: ignore[list-item]
        if not 1 <= len(prompts) <= self.max_batch:
            cause = f"{len(prompts)} prompts, where 1 to {self.max_batch} fit"
            raise BadInput(cause, "give fewer, or compile with a larger max_batch")
        self.reset()
        checked = [self._checked(prompt, slot, more=1) for slot, prompt in enumerate(prompts)]
        how = Sampling(temperature, top_k, top_p, min_p, seed)
        steps = self._texts(checked, max_new_tokens, how, self.stop if stop is None else frozenset(stop))
        return (step[0] for step in steps) if single else steps

    def _texts(
        self, prompts: list[Tensor], most: int, how: Sampling, stop: frozenset[int]
    ) -> Iterator[list[int | None]]:
        if most < 1:
            return
        logits = torch.stack([self.prefill(prompt, slot) for slot, prompt in enumerate(prompts)])
        live = list(range(len(prompts)))
        drawn = how.draw(logits, live, [self.lengths[slot] - 1 for slot in live])
        for count in range(1, most + 1):
            step = {slot: token for slot, token in zip(live, drawn, strict=True) if token not in stop}
            if not step:
                return
            yield [step.get(slot) for slot in range(len(prompts))]
            live = [slot for slot in step if self.lengths[slot] < self.max_length]
            if count == most or not live:
                return
            drawn = self._follow([step[slot] for slot in live], live, how)

    @property
    def compression(self) -> float:
        """The bytes of weights that a step reads, of those that they have as they are stored."""
        return self.runner.compression

    def bytes_a_step(self) -> int:
        """Bytes of weights and caches that the next step of all slots in use reads."""
        return self.runner.bytes_a_token([length for length in self.lengths if length] or [0])

    def explain(self) -> list[str]:
        """Why each step that torch runs is not run by the interpreter; empty where there is none."""
        return [step.why for step in self.program.steps if isinstance(step, Torch)]

    def _checked(self, ids: Ints, slot: int, more: int = 0) -> Tensor:
        """Token ids for a slot. Raises BadInput where they do not fit."""
        self._check_slot(slot)
        tokens = _long(ids)
        if tokens.ndim != 1 or not len(tokens):
            raise BadInput(
                "the prompt is empty" if not tokens.numel() else "a prompt is one row of token ids", "give token ids"
            )
        self._check_room(int(tokens.min()), int(tokens.max()), len(tokens), slot, more)
        return tokens

    def _check_slot(self, slot: int) -> None:
        if not 0 <= slot < self.max_batch:
            raise BadInput(f"slot {slot}, where {self.max_batch} are", "compile with a larger max_batch")

    def _check_room(self, low: int, high: int, tokens: int, slot: int, more: int = 0) -> None:
        """Raises BadInput for ids from low to high that are not all known, or that a slot has no room for."""
        known = self.runner.vocabulary
        if low < 0 or (known is not None and high >= known):
            wrong = low if low < 0 else high
            raise BadInput(
                f"token id {wrong} is out of range: the model knows 0 to {(known or 0) - 1}", "use its tokenizer"
            )
        check_window(tokens, self.max_length - self.lengths[slot] - more, self.max_length)


def _runners(
    program: Program, max_batch: int, cache_dtype: torch.dtype | None, device: str
) -> tuple[Runner | CudaRunner, PlainRunner]:
    """What runs one token of each sequence, and what runs many of one, over the same caches."""
    if device == "cpu":
        runner = Runner(program, max_batch, cache_dtype or dtype_of(program))
        return runner, PromptRunner(program, runner.caches)
    from taut.runtime.cuda import CudaRunner, LongRunner

    runner = CudaRunner(program, max_batch, cache_dtype, gpu(device))
    return runner, LongRunner(runner.program, runner.caches, runner.dtype)


def _few(program: Program, read: int) -> int:
    """Up to how many tokens of a prompt run one by one, each reading so many bytes.

    A small model's prompt costs what it takes to begin its steps. The rule looks at no clock, so that every run of a
    prompt rounds the same.
    """
    steps = len(program.steps)
    return max(FEW, int(steps * START / (steps * STEP + read / RATE)))


def _is_batch(ids: Sequence) -> bool:
    return len(ids) > 0 and not isinstance(ids[0], int) and not (isinstance(ids[0], Tensor) and ids[0].ndim == 0)


def _long(ids: Ints) -> Tensor:
    return torch.as_tensor(ids, dtype=torch.long, device="cpu")
