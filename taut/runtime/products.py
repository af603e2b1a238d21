"""Products of a few rows or of many with a weight as it is stored, on a CPU."""

from __future__ import annotations

from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor

from taut.ops._dispatch import FEW_TOKENS
from taut.ops.linear import linear


def multiplied(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x weight^T + bias of a floating point weight, in the dtype in which it is computed.

    Few rows are bound by reading the weight, many by arithmetic: those are multiplied in bfloat16 where the weight is
    stored so and the processor does, else in x's dtype.
    """
    x = x.contiguous()
    if len(x) <= FEW_TOKENS:
        return linear(x, weight, bias)
    if weight.dtype == torch.bfloat16 and x.dtype != torch.float64 and multiplies_bfloat16():
        y = F.linear(x.bfloat16(), weight)
        return y if bias is None else bias + y
    return linear(x, weight.to(x.dtype), bias)


@cache
def multiplies_bfloat16() -> bool:
    """Whether the processor has products of bfloat16, which torch's library then uses."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return any(known.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
