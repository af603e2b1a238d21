"""The words of a decode program: one token a row, rows independent of each other but for the weights they share.

A program is a list of steps over named float32 buffers of shape (rows, width). Row r stands at `positions[r]` of its
own sequence and owns slot `slots[r]` of every cache. Weights are in PyTorch's layout (outputs, inputs).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import Tensor


@dataclass(frozen=True)
class View:
    """Columns `start` to `stop` of a buffer."""

    buffer: str
    start: int
    stop: int


@dataclass(frozen=True, eq=False)
class Weight:
    """A matrix (n, k) as it is stored: floating point, int8 with a scale a row, or int4 in groups (ops/_weights)."""

    data: Tensor
    scale: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Norm:
    """(x - mean, if centred) / sqrt(mean of squares + eps) * gain + bias, over all of the last axis."""

    eps: float
    gain: Tensor | None = None
    bias: Tensor | None = None
    centred: bool = False


@dataclass(frozen=True, eq=False)
class Rotary:
    """cos and sin by position, (positions, rotated / 2) each; the first `rotated` features of a head are turned.

    `interleaved` pairs features 2i and 2i + 1, else i and i + rotated / 2.
    """

    cos: Tensor
    sin: Tensor
    interleaved: bool = False


@dataclass(frozen=True, eq=False)
class Embed:
    """out = table[token] * scale + positions[position + offset]; with no table, what the position alone decides."""

    out: str
    table: Weight | None
    scale: float = 1.0
    positions: Weight | None = None
    offset: int = 0


@dataclass(frozen=True, eq=False)
class Normalize:
    """out = norm(x) + residual"""

    out: str
    x: View
    norm: Norm
    residual: View | None = None


@dataclass(frozen=True, eq=False)
class Linear:
    """out = softcap(activation(norm(x) weight^T + bias) * scale) + residual"""

    out: str
    x: View
    weight: Weight
    bias: Tensor | None = None
    norm: Norm | None = None
    activation: str | None = None
    scale: float = 1.0
    softcap: float | None = None
    residual: View | None = None


@dataclass(frozen=True, eq=False)
class Glu:
    """out = activation(norm(x) gate^T + gate_bias) * (norm(x) up^T + up_bias)"""

    out: str
    x: View
    gate: Weight
    up: Weight
    activation: str
    gate_bias: Tensor | None = None
    up_bias: Tensor | None = None
    norm: Norm | None = None


@dataclass(frozen=True, eq=False)
class Attend:
    """Norm q and k by head, turn them, append k and v to cache `layer`, attend from `first[position]` to the position.

    q is (rows, heads d), k (rows, kv_heads d), v (rows, kv_heads dv). With k and v None nothing is appended: the
    layer reads another's cache. `alibi` holds a slope a head, `sinks` a logit a head; `first` is int64 (positions,).
    """

    out: str
    q: View
    k: View | None
    v: View | None
    layer: int
    heads: int
    kv_heads: int
    d: int
    dv: int
    scale: float
    rotary: Rotary | None = None
    q_norm: Norm | None = None
    k_norm: Norm | None = None
    softcap: float | None = None
    first: Tensor | None = None
    alibi: Tensor | None = None
    sinks: Tensor | None = None


@dataclass(frozen=True, eq=False)
class Combine:
    """out = a * scale + b * b_scale, or a * b where `product`; b None leaves a * scale."""

    out: str
    a: View
    b: View | None = None
    scale: float = 1.0
    b_scale: float = 1.0
    product: bool = False


@dataclass(frozen=True, eq=False)
class Torch:
    """Whatever has no word of its own: `run` takes float32 tensors (rows, width) and returns as many as `outs`."""

    outs: tuple[str, ...]
    inputs: tuple[View, ...]
    run: Callable[..., tuple[Tensor, ...]]
    why: str


Step = Embed | Normalize | Linear | Glu | Attend | Combine | Torch


@dataclass(frozen=True, eq=False)
class Program:
    """Steps in order; `widths` of every buffer; `logits` is the buffer that holds the answer.

    `caches` has (kv_heads, d, dv) of every cache layer, `max_length` positions each; `names` says of every buffer in
    which module its value is computed.
    """

    steps: tuple[Step, ...]
    widths: dict[str, int]
    logits: str
    caches: tuple[tuple[int, int, int], ...]
    max_length: int
    names: dict[str, str] = field(default_factory=dict)
