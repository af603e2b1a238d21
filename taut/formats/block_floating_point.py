"""Block floating point: groups of signed integers that share one exponent.

Source: Wilkinson, Rounding Errors in Algebraic Processes, 1963, section 1.3;
    for batch norm: Noh et al., LightNorm, 2022, arXiv:2211.02686.
Differs: the last group of an axis may be short.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.formats.minifloat import floor_log2, power_of_two


def bfp_quantize(x: Tensor, group: int = 16, mantissa_bits: int = 8) -> Tensor:
    """x [..., d] rounded to block floating point: groups of `group` along the last axis, signed mantissas.

    The error is at most 2**(1 - mantissa_bits) of the group's largest magnitude. Same shape and dtype.
    """
    d = x.shape[-1]
    wide = x if x.dtype == torch.float64 else x.float()
    blocks = F.pad(wide, (0, -d % group)).unflatten(-1, (-1, group))
    absmax = blocks.abs().amax(-1, keepdim=True)
    step = power_of_two((floor_log2(absmax) + 2 - mantissa_bits).clamp(min=-126), wide.dtype)
    top = 2 ** (mantissa_bits - 1)
    rounded = (blocks / step).round().clamp(-top, top - 1) * step
    return rounded.flatten(-2)[..., :d].to(x.dtype)
