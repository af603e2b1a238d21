"""What takes turns: transformers as it is, through torch.compile, and taut's engine, each on one sequence."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor


class Engine(Protocol):
    """What `taut.compile` gives, as far as it is timed: slot 0 alone is used."""

    def prefill(self, ids: Any, slot: int = 0) -> Tensor: ...
    def decode(self, tokens: Any) -> Tensor: ...
    def reset(self, slot: int | None = None) -> None: ...
    def explain(self) -> list[str]: ...


class Eager:
    """transformers' own forward with its own cache, on the device that the model is on."""

    def __init__(self, model: Any) -> None:
        self.model, self.cache = model, None
        self.device = next(model.parameters()).device

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.cache = None
        return self._run(ids)

    def step(self, token: int) -> Tensor:
        return self._run([token])

    @torch.inference_mode()
    def _run(self, ids: Sequence[int]) -> Tensor:
        given = torch.tensor([list(ids)], device=self.device)
        out = self.model(input_ids=given, past_key_values=self.cache, use_cache=True)
        self.cache = out.past_key_values
        return out.logits[0, -1]


class Compiled(Eager):
    """The same forward through torch.compile, over a cache of fixed size; on a GPU it replays CUDA graphs."""

    def __init__(self, model: Any, length: int) -> None:
        from transformers import StaticCache

        super().__init__(model)
        self.cache: Any = StaticCache(model.config, max_cache_len=length)
        self.position, self.forward = 0, model
        self._run([0])  # makes the tensors of the cache, which may not be made inside of a graph
        mode = "reduce-overhead" if self.device.type == "cuda" else None
        self.forward = torch.compile(model.forward, dynamic=False, mode=mode)

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.cache.reset()
        self.position = 0
        return self._run(ids)

    @torch.no_grad()
    def _run(self, ids: Sequence[int]) -> Tensor:
        torch.compiler.cudagraph_mark_step_begin()
        places = torch.arange(self.position, self.position + len(ids), device=self.device)[None]
        tokens = torch.tensor([list(ids)], device=self.device)
        out = self.forward(input_ids=tokens, past_key_values=self.cache, use_cache=True, position_ids=places)
        self.position += len(ids)
        return out.logits[0, -1]


class Ours:
    """taut's engine on slot 0."""

    def __init__(self, engine: Engine) -> None:
        self.engine = engine

    def prefill(self, ids: Sequence[int]) -> Tensor:
        self.engine.reset(0)
        return _row(self.engine.prefill(list(ids), 0))

    def step(self, token: int) -> Tensor:
        return _row(self.engine.decode([token]))


def _row(logits: Any) -> Tensor:
    return torch.as_tensor(logits).reshape(-1, logits.shape[-1])[-1]
