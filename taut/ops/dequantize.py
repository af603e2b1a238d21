"""The matrix, or the rows of one, that int8 or int4 codes and their scales stand for.

    int8: codes * scale, a scale a row          int4: (codes - 8) * scale, a scale a group of 32, two codes a byte

Source: Jacob et al., Quantization and Training of Neural Networks for Efficient Integer-Arithmetic-Only Inference,
2018, arXiv:1712.05877, eq. 1 (without a zero point); the groups of int4 are q4_0's of llama.cpp,
https://github.com/ggml-org/llama.cpp (ggml-quants.c, dequantize_row_q4_0).
Differs: int4 codes and scales are two tensors, not interleaved.
"""

from __future__ import annotations

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from taut.op import Work, nbytes, op
from taut.ops._weights import dequantize as dequantized
from taut.ops._weights import quantize
from taut.ops._wide import wide


@op
def dequantize(
    codes: Shaped[Tensor, "*rows stored"], scale: Float[Tensor, "*rows_and_groups"]
) -> Float[Tensor, "*rows k"]:
    """Rows in float32, or in the scale's dtype where that is wider; formats as in `taut.ops._weights.dequantize`.

    Raises ValueError where codes and scale do not fit together.
    """
    return dequantized(codes, scale, wide(scale).dtype)


@dequantize.least
def _(codes, scale) -> Work:
    count = codes.numel() * (2 if codes.dtype == torch.uint8 else 1)
    return Work(count, nbytes(codes, scale) + 4 * count)


@dequantize.tests
def _(make):
    for bits in (8, 4):
        codes, scale = quantize(make(24, 96), bits)
        yield (codes, scale.to(make(1).dtype)), {}
        yield (codes[:3].unflatten(0, (1, 3)), scale[:3].unflatten(0, (1, 3)).to(make(1).dtype)), {}
