"""Redundant parameters: what a layer's inputs never exercise, because a normalisation keeps them in a plane.

Source: Chun, The Geometric Cost of Normalization, 2026, arXiv:2603.27432.
Differs: counted as the rank of the inputs' second moment, which is what the theorem is about where the layer is linear
    and the noise Gaussian: the local learning coefficient of m outputs is m rank / 2.

LayerNorm's output lies in a hyperplane, so each of the m outputs that reads it has one redundant parameter and the
layer's local learning coefficient is m / 2 lower than its parameter count says; RMSNorm's lies on a sphere, which spans
the space. A bias joins the count as one more input that is always 1: a softmax's output sums to 1, which makes one of
the two redundant.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taut.checkpoint import BadInput


@dataclass(frozen=True)
class EffectiveDims:
    """One layer: `inputs` counts the bias as one input; `rank` of them are exercised by the data."""

    name: str
    inputs: int
    outputs: int
    rank: int

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"redundant_parameters": self.redundant_parameters}

    @property
    def redundant_parameters(self) -> int:
        return self.outputs * (self.inputs - self.rank)

    @property
    def learning_coefficient_drop(self) -> float:
        return self.redundant_parameters / 2


def second_moment(x: Tensor, *, bias: bool = False) -> Tensor:
    """Sum of x x^T over the tokens of x [..., d], in float64: [d, d], or [d + 1, d + 1] with a constant input 1."""
    tokens = x.detach().double().flatten(0, -2)
    if bias:
        tokens = torch.cat([tokens, torch.ones_like(tokens[:, :1])], 1)
    return tokens.T @ tokens


def moment_rank(moment: Tensor, dtype: torch.dtype = torch.float64) -> int:
    """Rank of a second moment [d, d] of inputs that were computed in `dtype`, whose rounding noise does not count.

    Inputs are scaled to equal size first, so that the answer does not depend on their units.
    """
    size = moment.diagonal().sqrt()
    size = torch.where(size > 0, size, 1.0)
    values = torch.linalg.eigvalsh(moment / size / size[:, None])
    noise = max(len(moment) * torch.finfo(torch.float64).eps, torch.finfo(dtype).eps ** 2)
    return int((values > noise * values[-1]).sum())


def effective_dims(model: nn.Module, batches: Iterable[Any]) -> list[EffectiveDims]:
    """Run the model on `batches` (each a tensor, or keyword arguments) and count, for every layer with a weight matrix,
    the inputs that the data exercises. It takes more tokens than the widest layer has inputs.

    Raises ValueError where a layer saw fewer tokens than inputs: its rank would be that of the sample.
    """
    return [layer.finish(name) for name, layer in _watched(model, batches).items()]


def _watched(model: nn.Module, batches: Iterable[Any]) -> dict[str, _Layer]:
    layers: dict[str, _Layer] = {}
    matrices = {name: module for name, module in model.named_modules() if _has_matrix(module)}
    handles = [m.register_forward_hook(partial(_record, layers, name)) for name, m in matrices.items()]
    try:
        with torch.no_grad():
            for batch in batches:
                model(**batch) if isinstance(batch, dict) else model(batch)
    finally:
        for handle in handles:
            handle.remove()
    return layers


def redundancy(model: nn.Module, texts: Iterable[Tensor] | None = None) -> list[EffectiveDims]:
    """`effective_dims` of a transformers model on token ids [batch, length], by default on made-up inputs, as many as
    its widest layer needs. Those show what the normalisations do; what text leaves idle, only text shows.

    Raises ValueError as `effective_dims`.
    """
    if texts is not None:
        return effective_dims(model, ({"input_ids": ids} for ids in texts))
    from taut.shrink import example_inputs

    made = lambda seed: example_inputs(model, 4, 128, seed)  # noqa: E731  (shorter where the model reads no more)
    first = _watched(model, [made(0)])
    count = max((2 * len(layer.moment) // layer.tokens + 1 for layer in first.values()), default=1)
    return effective_dims(model, map(made, range(count)))


def redundancy_of(
    model: str | Path, text: str | Path | None = None, revision: str | None = None, trust_remote_code: bool = False
) -> list[EffectiveDims]:
    """`redundancy` of a checkpoint, on a text file or on made-up inputs. It runs the model.

    Raises BadInput for what is no checkpoint with weights in its own form, and for a text that is too short.
    """
    from taut.opened import open_model

    opened = open_model(model, revision, trust_remote_code)
    path: Any = opened.checkpoint.path
    if opened.in_taut_form:
        raise BadInput(f"{path} is in taut form, which has no layers to look into", "give the original checkpoint")
    build: Any = opened.model_class
    loaded = build.from_pretrained(path, trust_remote_code=trust_remote_code, dtype=torch.float32).eval()
    try:
        return redundancy(loaded, None if text is None else ids_of(path, text))
    except ValueError as error:
        raise BadInput(str(error), "give a longer text with --text") from error
    except OSError as error:
        raise BadInput(f"{text} cannot be read: {error}", "give a text file, and a model with a tokenizer") from error


def ids_of(path: str | Path, text: str | Path, length: int = 128) -> list[Tensor]:
    """The tokens of a text file as rows [1, length] of ids, by a checkpoint's tokenizer; a short rest is left out.
    Raises ValueError where there is not one row."""
    from transformers import AutoTokenizer

    ids = AutoTokenizer.from_pretrained(path)(Path(text).read_text(), return_tensors="pt").input_ids
    if ids.shape[1] < length:
        raise ValueError(f"{text} has {ids.shape[1]} tokens, and a row takes {length}")
    return list(ids[:, : ids.shape[1] // length * length].view(-1, 1, length))


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    return isinstance(weight, Tensor) and weight.dim() == 2


@dataclass
class _Layer:
    """What one layer has read so far."""

    moment: Tensor
    tokens: int
    outputs: int
    dtype: torch.dtype

    def finish(self, name: str) -> EffectiveDims:
        inputs = len(self.moment)
        if self.tokens <= inputs:
            raise ValueError(f"{name} has {inputs} inputs and saw {self.tokens} tokens; give more data")
        return EffectiveDims(name, inputs, self.outputs, moment_rank(self.moment, self.dtype))


def _record(layers: dict[str, _Layer], name: str, module: Any, args: tuple, output: Any) -> None:
    """Forward hook: add what the layer read; an embedding, which reads whole numbers, is none."""
    if not (args and isinstance(args[0], Tensor) and args[0].is_floating_point()):
        return
    x, weight = args[0], module.weight
    if x.shape[-1] not in weight.shape:
        return
    moment = second_moment(x, bias=getattr(module, "bias", None) is not None)
    layer = layers.setdefault(name, _Layer(torch.zeros_like(moment), 0, weight.numel() // x.shape[-1], x.dtype))
    layer.moment += moment
    layer.tokens += x.flatten(0, -2).shape[0]
