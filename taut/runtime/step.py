"""One step of a model over a cache of our own, as a Graph: one token, its position and the caches in, logits out.

Keys and values go into the cache by `index_copy` and come out as values of the graph, so that nothing is written in
place; which token may look at which is left to the model's own masking code, evaluated by position afterwards.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from taut.graph import Graph
from taut.tracing import CannotTrace, hides_something, imported, quiet, reason, traceable

TOKEN, POSITION, LOGITS = "token", "position", "logits"


def trace_step(model: nn.Module, max_length: int) -> Graph:
    """The decode step of a causal model with caches of `max_length` positions, on the device of the model.

    Inputs: `token` (1, 1), `position` (1,), and `keys.i`, `values.i` (1, kv_heads, max_length, d) of every layer that
    keeps some. Raises CannotTrace with the reason.
    """
    device = next(model.parameters()).device
    token = torch.zeros(1, 1, dtype=torch.long, device=device)
    position = torch.zeros(1, dtype=torch.long, device=device)
    with traceable(model, experts="batched_mm"), torch.no_grad(), warnings.catch_warnings(), quiet():
        warnings.simplefilter("ignore")
        try:
            caches = _caches(model, token, position, max_length)
        except Exception as error:
            raise CannotTrace(reason(error)) from error
        inputs = {TOKEN: token, POSITION: position} | caches
        failed: Exception | None = None
        for told in SPELLINGS:
            try:
                exported = torch.export.export(_Step(model, told), (inputs,), strict=False)
                if hides_something(exported.graph):
                    exported = exported.run_decompositions({})
                return imported(exported, model, tuple(inputs), (LOGITS,))
            except Exception as error:
                failed = failed or error
    raise CannotTrace(reason(failed)) from failed  # type: ignore[arg-type]


SPELLINGS = ((), ("position_ids",), ("attention_mask",), ("attention_mask", "position_ids"))
"""What a model is told beside the token and the cache: some cannot work out their positions from a traced number."""


class _Step(nn.Module):
    def __init__(self, model: nn.Module, told: tuple[str, ...]) -> None:
        super().__init__()
        self.model, self.told = model, told

    def forward(self, inputs: dict[str, Tensor]) -> list[Tensor]:
        given = dict(inputs)
        token, position = given.pop(TOKEN), given.pop(POSITION)
        cache = _cache(position, lambda layer: (given[f"keys.{layer}"], given[f"values.{layer}"]), len(given) // 2)
        length = given["keys.0"].shape[2]
        more = {"position_ids": position[None], "attention_mask": token.new_ones(1, length)}
        return [_run(self.model, token, cache, {name: more[name] for name in self.told})]


def _run(model: nn.Module, token: Tensor, cache: Any, more: Mapping[str, Tensor] = MappingProxyType({})) -> Tensor:
    known = inspect.signature(model.forward).parameters
    switches = {"past_key_values": cache, "use_cache": True, "return_dict": True, **more}
    result = model(input_ids=token, **{name: value for name, value in switches.items() if name in known})
    if not isinstance(getattr(result, "logits", None), Tensor):
        raise CannotTrace("the model returns no logits")
    return result.logits


def _caches(model: nn.Module, token: Tensor, position: Tensor, max_length: int) -> dict[str, Tensor]:
    """What each layer keeps, found by running the model once: layers that keep nothing have caches without heads."""
    made: dict[int, tuple[Tensor, Tensor]] = {}

    def empty(layer: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        made[layer] = tuple(t.new_zeros(*t.shape[:2], max_length, t.shape[3]) for t in (keys, values))  # type: ignore
        return made[layer]

    layers = model.config.get_text_config().num_hidden_layers  # type: ignore[union-attr]
    _run(model, token, _cache(position, None, layers, empty, max_length))
    if sorted(made) != list(range(len(made))):
        raise CannotTrace("some layers keep keys and values and earlier ones keep none")
    if not made:
        raise CannotTrace("no layer keeps keys and values")
    return {f"{kind}.{i}": made[i][j] for i in sorted(made) for j, kind in enumerate(("keys", "values"))}


def _cache(position: Tensor, stored: Any, count: int, empty: Any = None, max_length: int = 0) -> Any:
    """transformers' cache over layers that append by copying."""
    from transformers.cache_utils import Cache, StaticLayer

    class Layer(StaticLayer):
        def __init__(self, index: int) -> None:
            size = max_length if stored is None else stored(index)[0].shape[2]
            super().__init__(size)
            self.index, self.cumulative_length = index, position[0]
            self.is_initialized = True
            if stored is not None:
                self.keys, self.values = stored(index)

        def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any):
            if empty is not None:
                self.keys, self.values = empty(self.index, key_states, value_states)
            keys: Any = self.keys
            values: Any = self.values
            self.keys = keys = keys.index_copy(2, position, key_states)
            self.values = values = values.index_copy(2, position, value_states)
            self.cumulative_length = self.cumulative_length + key_states.shape[2]
            return keys, values

    return Cache(layers=[Layer(i) for i in range(count)])
