"""From a model to an engine: its step exported, prepared and lowered, its weights read when the program is made."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
from torch import Tensor, nn

from taut.checkpoint.errors import BadInput
from taut.coded import BITS, DTYPES, with_noise
from taut.machine import Progress
from taut.ops._weights import GROUP, quantize
from taut.runtime.engine import Engine
from taut.runtime.exporting import CannotCompile, module_graph
from taut.runtime.lower import CannotLower, lower
from taut.runtime.parts import Convert
from taut.runtime.placed import gpu
from taut.runtime.steps import Weight
from taut.runtime.stored import checkpoint_graph


def compile(
    model: str | Path | nn.Module,
    device: str = "cpu",
    *,
    max_length: int | None = None,
    max_batch: int = 1,
    weights: str | Convert | None = None,
    cache_dtype: torch.dtype | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    progress: Progress | None = None,
) -> Engine:
    """Compile a causal model into an engine that decodes at the speed of memory.

    `model` is a directory, a hub id or an nn.Module; `device` is "cpu" or "cuda". Weights stay as they are stored
    (`weights` None), or become "fp32", "bf16", "fp16" or, on a CPU, "int8" (a scale a row) or "int4" (groups of 32).
    Caches have the weights' dtype, float32 for int8 and int4; activations are float32 on a CPU, of the weights' dtype
    on a GPU. Raises BadInput with the cause and the cure: for what is no model, a device that cannot be used, a step
    that cannot be exported or lowered, and what does not fit.
    """
    if device != "cpu":
        gpu(device)
    convert = converter(weights)
    tell = progress or (lambda what: None)
    if isinstance(model, nn.Module):
        graph, stop = module_graph(model, max_length, device, tell)
    else:
        graph, stop = checkpoint_graph(model, max_length, revision, trust_remote_code, tell)
    tell("reading weights")
    try:
        program = lower(graph, convert)
    except CannotLower as error:
        raise CannotCompile(f"the model's step cannot be lowered: {error}", "generate with transformers") from error
    tell("compiling kernels, which are kept")
    engine = Engine(program, max_batch, cache_dtype, stop, device)
    engine.prefill([0])
    engine.reset()
    return engine


def converter(weights: str | Convert | None) -> Convert:
    """How matrices are kept. Raises BadInput for an unknown name."""
    if weights is None:
        return Weight
    if not isinstance(weights, str):
        return weights
    if weights in DTYPES:
        return lambda matrix: Weight(matrix.to(DTYPES[weights]))
    if weights in BITS:
        return partial(_quantized, weights)
    raise BadInput(f"no weights {weights!r}", f"take one of {', '.join([*DTYPES, *BITS])}")


def _quantized(weights: str, matrix: Tensor) -> Weight:
    if weights == "int4" and matrix.shape[1] % GROUP:
        raise BadInput(f"int4 weights need inputs in groups of {GROUP}, and a layer has {matrix.shape[1]}", "take int8")
    return Weight(*quantize(matrix, BITS[weights]))


def noisy(weights: str, seed: int) -> Convert:
    """Matrices in float32 with random noise of the accuracy that "int8" or "int4" has: what those are compared with."""
    generator = torch.Generator().manual_seed(seed)

    def convert(matrix: Tensor) -> Weight:
        fits = weights == "int8" or matrix.shape[1] % GROUP == 0
        return Weight(with_noise(matrix.float(), BITS[weights], generator) if fits else matrix)

    return convert
