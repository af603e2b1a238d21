"""Compressed weights hold every bit, and multiply as what they hold."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from taut.ops._laid import abreast, compressed, copied, laid
from taut.ops._numba.compressed import EXCEPTION, HEAD, LOOKS_UP, NAMES, NEXT, NUMBERS, size_of_round
from taut.ops._numba.formats import (
    BFLOAT16_ABREAST,
    BFLOAT16_COMPRESSED,
    FLOAT32_ABREAST,
    FLOAT32_COMPRESSED,
    PRODUCTS,
)
from taut.ops._numba.kernels import callable_at
from taut.ops._numba.simd import ROOMY

pytestmark = pytest.mark.skipif(not LOOKS_UP, reason="COMPRESSED WEIGHTS NOT TESTED: no instruction looks up bytes")
FORMS = {torch.float32: (FLOAT32_COMPRESSED, FLOAT32_ABREAST), torch.bfloat16: (BFLOAT16_COMPRESSED, BFLOAT16_ABREAST)}
SHAPES = [(64, 576), (80, 577), (33, 1537), (16, 256), (250, 301)]


def weights(n: int, k: int, dtype: torch.dtype, exceptions: int = 0) -> Tensor:
    """Normal numbers and zeros, of which some are given other sizes."""
    torch.manual_seed(n + k)
    weight = torch.randn(n, k).mul(0.02)
    weight[torch.rand(n, k) < 0.01] = 0
    odd = torch.tensor([1e-30, -1e-20, 3e4, -0.0, 1e-45, -7e-12, torch.inf, 2e-9])
    places = torch.randperm(n * k)[:exceptions]
    weight.flatten()[places] = odd[torch.arange(exceptions) % len(odd)]
    return weight.to(dtype)


def stored(weight: Tensor) -> Tensor:
    """The compressed weight, in memory that held something else."""
    plan = compressed(weight)
    assert plan is not None
    return plan.write(torch.full((plan.nbytes,), 77, dtype=torch.uint8))


def read_back(found: Tensor, n: int, k: int, dtype: torch.dtype) -> Tensor:
    """The weight again, by the description alone and one number after the other."""
    size = dtype.itemsize
    round_, rounds, raw = size_of_round(size), -(-k // 4), found.view(torch.uint8).numpy()
    bits = np.zeros((len(raw) * 16, rounds * 4), np.uint32)
    lanes = 16 if ROOMY else 8
    for b, block in enumerate(raw):
        table, room = block[:NAMES], int(block[NAMES:].view(np.int32)[0])
        for i, round_bytes in enumerate(block[HEAD:][: rounds * round_].reshape(rounds, round_)):
            names, lows = round_bytes[:NEXT], round_bytes[NEXT + NUMBERS :].view(np.uint16)
            for r in range(16):
                for n_ in range(4):
                    place = r // 4 * 16 + n_ * 4 + r % 4
                    high = table[names[place % 32] >> (4 * (place // 32)) & 15]
                    number = int(high) << 24 | int(round_bytes[NEXT + place]) << 16
                    if size == 4:
                        pair = r // lanes * 2 + n_ // 2
                        number |= int(lows[pair * 2 * lanes + r % lanes // 4 * 8 + n_ % 2 * 4 + r % 4])
                    bits[16 * b + r, 4 * i + n_] = number
        for exception in block[HEAD + rounds * round_ :].reshape(room, EXCEPTION):
            where, value = int(exception[:4].view(np.int32)[0]), exception[4:].view(np.uint32)[0]
            if where >= 0:
                assert bits[16 * b + where % 16, where // 16] == 0
                bits[16 * b + where % 16, where // 16] = value
    assert not bits[n:].any()
    assert not bits[:, k:].any()
    held = bits[:n, :k].view(np.int32) if size == 4 else (bits[:n, :k] >> 16).astype(np.uint16).view(np.int16)
    return torch.from_numpy(held.copy()).view(dtype)


def product(form: int, weight: Tensor, x: Tensor, outputs: int) -> Tensor:
    """x weight^T, for x padded with zeros."""
    tokens, k = x.shape
    seen = torch.zeros(tokens, -(-k // 16) * 16)
    seen[:, :k] = x
    out = torch.full((tokens, -(-outputs // 16) * 16), torch.nan)
    run = callable_at(PRODUCTS[form](), 11)
    place = weight.data_ptr()
    run(place, 0, seen.data_ptr(), 4 * seen.shape[1], tokens, k, 0, outputs, out.data_ptr(), 4 * out.shape[1], place)
    return out[:, :outputs]


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_every_bit_is_kept(n: int, k: int, dtype: torch.dtype):
    weight = weights(n, k, dtype, 16)
    found = stored(weight)
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(read_back(found, n, k, dtype).view(as_bits), weight.view(as_bits))
    assert found.nbytes < (0.9 if dtype == torch.float32 else 0.8) * weight.nbytes * (-(-n // 16) * 16) / n


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 3, 4, 5, 6, 7, 16])
@pytest.mark.parametrize(("n", "k"), SHAPES)
def test_products_without_exceptions_are_the_same_bits(n: int, k: int, tokens: int, dtype: torch.dtype):
    form, plain = FORMS[dtype]
    weight = torch.empty(n, k).uniform_(1, 200).mul(torch.randint(2, (n, k)) * 2 - 1).to(dtype)
    x = torch.randn(tokens, k)
    theirs = product(plain, copied(abreast(weight)).write(torch.empty(abreast(weight).nbytes, dtype=torch.uint8)), x, n)
    assert torch.equal(product(form, stored(weight), x, n), theirs)


@pytest.mark.parametrize("dtype", FORMS)
@pytest.mark.parametrize("tokens", [1, 2, 5, 16])
def test_exceptions_are_multiplied_too(tokens: int, dtype: torch.dtype):
    n, k = 250, 301
    weight = weights(n, k, dtype, 200)
    weight[weight.isinf()] = 1e6
    x = torch.randn(tokens, k)
    ours = product(FORMS[dtype][0], stored(weight), x, n).double()
    exact, size = x.double() @ weight.double().T, x.double().abs() @ weight.double().abs().T
    assert ((ours - exact).abs() <= k * 2**-24 * size).all()


def test_what_would_not_become_smaller_is_left():
    normal = weights(64, 576, torch.bfloat16)
    assert compressed(normal.half()) is None
    assert compressed(torch.randn(16, 4)) is None
    assert compressed(torch.empty(0, 64)) is None
    wide = torch.randint(-(2**15), 2**15, (64, 576)).to(torch.int16).view(torch.bfloat16)
    assert compressed(wide) is None
    for some in (wide, normal.half()):
        assert laid(some, 1).nbytes == some.nbytes
    assert laid(normal, 1).nbytes < 0.8 * normal.nbytes
    assert laid(normal, 16).nbytes == normal.nbytes


@pytest.mark.parametrize("value", [0.0, -0.0, 1.5, torch.nan, torch.inf, -1e-42])
@pytest.mark.parametrize("dtype", FORMS)
def test_weights_of_one_value(value: float, dtype: torch.dtype):
    weight = torch.full((20, 260), value, dtype=dtype)
    weight[3, 5] = 7
    as_bits = torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(read_back(stored(weight), 20, 260, dtype).view(as_bits), weight.view(as_bits))


@given(seed=st.integers(0, 2**31), scale=st.integers(-30, 30), spread=st.integers(0, 3), turned=st.booleans())
def test_rows_of_any_scales(seed: int, scale: int, spread: int, turned: bool):
    generator = torch.Generator().manual_seed(seed)
    n, k = 40, 132
    scales = torch.randn(n, 1, generator=generator).mul(spread).add(scale).exp2()
    weight = (torch.randn(n, k, generator=generator) * scales).to(torch.float32)
    if turned:
        weight = weight.T.contiguous().T
    if compressed(weight) is None:
        return
    assert torch.equal(read_back(stored(weight), n, k, torch.float32), weight)
