"""Weight formats that linear ops read: floating point, int8 with a scale a row, int4 with a scale a group of 32."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
ABREAST, INPUTS = 16, 4
"""Outputs and inputs that lie together where a CPU reads a weight best."""


def dequantize(weight: Tensor, scale: Tensor | None, dtype: torch.dtype) -> Tensor:
    """The weight (out, in) as floating point of a dtype.

    Without a scale the weight is floating point already. int8 (out, in) takes a scale (out,). uint8 (out, in / 2) holds
    int4 codes biased by 8 and takes a scale (out, in / 32): in a group of 32 inputs, byte j holds input j in its low
    half and input j + 16 in its high half.

    Raises ValueError for any other pair of weight and scale.
    """
    if scale is None and weight.is_floating_point():
        return weight.to(dtype)
    if scale is not None and weight.dtype == torch.int8:
        return weight.to(dtype) * scale.to(dtype)[..., None]
    if scale is not None and weight.dtype == torch.uint8:
        codes = weight.unflatten(-1, (-1, GROUP // 2))
        codes = torch.cat((codes & 15, codes >> 4), -1).to(dtype) - 8
        return (codes * scale.to(dtype)[..., None]).flatten(-2)
    raise ValueError(
        f"a {weight.dtype} weight {'without' if scale is None else 'with'} a scale is no known format: "
        "floating point takes none, int8 takes one a row, uint8 (packed int4) one a group of 32"
    )


def quantize(weight: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """(stored weight, scale) of a floating point weight (out, in), to the nearest code, in the formats of `dequantize`.

    8 bits: int8 with a float32 scale a row, from the row's greatest magnitude. 4 bits: packed into uint8 with a float16
    scale a group of 32, whose sign puts the group's greatest magnitude on code 0 (as llama.cpp's q4_0).
    Raises ValueError for other widths, and for 4 bits where the inputs are no multiple of 32.
    """
    if bits == 8:
        scale = weight.float().abs().amax(-1).div(127).clamp_min(torch.finfo(torch.float32).tiny)
        return (weight.float() / scale[:, None]).round().to(torch.int8), scale
    if bits != 4 or weight.shape[-1] % GROUP:
        raise ValueError(f"{bits} bits for {weight.shape[-1]} inputs: choose 8, or 4 with a multiple of {GROUP} inputs")
    groups = weight.float().unflatten(-1, (-1, GROUP))
    extreme = groups.gather(-1, groups.abs().argmax(-1, keepdim=True))
    scale = (extreme / -8).half()
    codes = (groups / scale.float().where(scale != 0, 1) + 8).round().clamp(0, 15).to(torch.uint8)
    low, high = codes.chunk(2, -1)
    return (low | high << 4).flatten(-2), scale[..., 0]
