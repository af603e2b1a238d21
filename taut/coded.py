"""Matrices that are kept as integer codes with scales: what is stored, what it stands for, and noise as large."""

from __future__ import annotations

import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from taut.ops._weights import GROUP, dequantize, quantize
from taut.values import Read, Rows, Value

BITS = {"int8": 8, "int4": 4}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
"""How weights may be kept, by name: as codes of so many bits, or in a dtype."""


@dataclass(frozen=True)
class Turned(Value):
    """A matrix with its axes swapped."""

    x: Value

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        turned = self.x.evaluate(read).mT
        return turned if rows is None else turned[rows]


@dataclass(frozen=True)
class Codes(Value):
    """The codes of a matrix (out, in) in so many bits, as `taut.ops._weights.quantize` stores them."""

    x: Value
    bits: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return quantize(self.x.evaluate(read, rows), self.bits)[0].double()


@dataclass(frozen=True)
class Scales(Value):
    """The scales that belong to `Codes`."""

    x: Value
    bits: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        return quantize(self.x.evaluate(read, rows), self.bits)[1].double()


@dataclass(frozen=True)
class Decoded(Value):
    """The matrix that codes and scales stand for."""

    codes: Value
    scale: Value
    bits: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        codes = self.codes.evaluate(read, rows).to(STORED[self.bits][0])
        return dequantize(codes, self.scale.evaluate(read, rows), torch.float64)


@dataclass(frozen=True)
class Noisy(Value):
    """A matrix with an error drawn evenly from one step of its codes, independent of everything.

    Source: Bennett, Spectra of quantized signals, 1948, https://archive.org/details/bstj27-3-446: what rounding to so
    many levels does to a signal that knows nothing of them.
    """

    x: Value
    bits: int
    name: str
    seed: int

    def evaluate(self, read: Read, rows: Rows = None) -> Tensor:
        generator = torch.Generator().manual_seed(zlib.crc32(self.name.encode()) + self.seed)
        noisy = with_noise(self.x.evaluate(read), self.bits, generator)
        return noisy if rows is None else noisy[rows]


STORED = {8: (torch.int8, torch.float32), 4: (torch.uint8, torch.float16)}
"""The dtypes of codes and scales, by bits."""


def sizes(n: int, k: int, bits: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The shapes of the codes and the scales of a matrix (n, k)."""
    return ((n, k), (n,)) if bits == 8 else ((n, k // 2), (n, k // GROUP))


def with_noise(x: Tensor, bits: int, generator: torch.Generator) -> Tensor:
    """A matrix (out, in) plus noise that is even over one step of its codes."""
    scale = quantize(x, bits)[1].to(x.dtype).abs()
    step = scale[:, None] if bits == 8 else scale.repeat_interleave(GROUP, -1)
    return x + (torch.rand(x.shape, generator=generator, dtype=x.dtype) - 0.5) * step
