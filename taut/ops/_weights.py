"""Weight formats that linear ops read: floating point, int8 with a scale a row, int4 with a scale a group of 32."""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32


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
        return weight.to(dtype) * scale.to(dtype)[:, None]
    if scale is not None and weight.dtype == torch.uint8:
        codes = weight.unflatten(-1, (-1, GROUP // 2))
        codes = torch.cat((codes & 15, codes >> 4), -1).to(dtype) - 8
        return (codes * scale.to(dtype)[..., None]).flatten(-2)
    raise ValueError(
        f"a {weight.dtype} weight {'without' if scale is None else 'with'} a scale is no known format: "
        "floating point takes none, int8 takes one a row, uint8 (packed int4) one a group of 32"
    )
