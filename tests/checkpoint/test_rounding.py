from fractions import Fraction

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from taut.checkpoint import Scale, TensorInfo
from taut.checkpoint.kernels import check, count_different, count_nonfinite, scale
from taut.checkpoint.rounding import Lost, lost, round_once
from taut.checkpoint.stream import BITS, FORMATS

DTYPES = (torch.float16, torch.bfloat16, torch.float32)
FACTORS = torch.tensor([1.0, -1.0, 0.0, 0.7, 1.5, 1e-3, -3e4, 1 / 3, 2.0**-9, 1e-38, 1e30, 5e-324], dtype=torch.float64)


def every_value(dtype: torch.dtype) -> torch.Tensor:
    """All values of a 16-bit dtype; a spread over those of float32."""
    if dtype is torch.float32:
        return torch.arange(0, 1 << 32, 65521).to(torch.uint32).view(dtype)
    return torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(dtype)


def nearest(x: Fraction, mantissa: int, exponent: int) -> Fraction | float:
    """The definition: to nearest, ties to even, in exact arithmetic."""
    bias = (1 << (exponent - 1)) - 1
    size, sign = abs(x), -1 if x < 0 else 1
    power = max(size.numerator.bit_length() - size.denominator.bit_length() - 1, -bias)
    while size >= Fraction(2) ** (power + 1):
        power += 1
    unit = Fraction(2) ** (max(power, 1 - bias) - mantissa)
    rounded = round(size / unit) * unit
    return sign * rounded if rounded < Fraction(2) ** (bias + 1) else sign * float("inf")


def near_midpoints(dtype: torch.dtype) -> st.SearchStrategy[float]:
    """Doubles at, and one step beside, the midpoint of two neighbouring values: where rounding twice goes wrong."""
    mantissa, exponent = FORMATS[dtype]
    top = ((1 << exponent) - 1) << mantissa
    bits = BITS[dtype.itemsize]

    def value(k: int, steps: int, sign: float) -> float:
        low, high = (torch.from_numpy(np.array([k + i], bits)).view(dtype).double().item() for i in (0, 1))
        middle = low + (min(high, 2 * low + 1e-300) - low) / 2 if np.isinf(high) else (low + high) / 2
        for _ in range(abs(steps)):
            middle = float(np.nextafter(middle, np.inf if steps > 0 else 0.0))
        return sign * middle

    return st.builds(value, st.integers(0, top - 2), st.integers(-2, 2), st.sampled_from([1.0, -1.0]))


@pytest.mark.parametrize("dtype", DTYPES)
@given(data=st.data())
def test_round_once_is_nearest_even_in_exact_arithmetic(dtype, data):
    x = data.draw(near_midpoints(dtype) | st.floats(allow_nan=False, allow_infinity=False))
    got = round_once(torch.tensor([x], dtype=torch.float64), dtype)
    want = nearest(Fraction(x), *FORMATS[dtype])
    assert got.double().item() == float(want)
    assert torch.signbit(got).item() == (np.copysign(1, x) < 0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_torch_rounds_twice_where_round_once_does_not(dtype):
    one_and_a_half_steps = 1 + torch.finfo(dtype).eps / 2
    x = torch.tensor([one_and_a_half_steps + 2.0**-40], dtype=torch.float64)
    assert x.to(dtype).item() == 1.0
    assert round_once(x, dtype).item() == 1 + torch.finfo(dtype).eps


def test_round_once_agrees_with_numpy_on_float16():
    x = every_value(torch.float16).double().outer(FACTORS[:8]).flatten()
    x = x[~x.isnan()]
    with np.errstate(over="ignore"):
        want = x.numpy().astype(np.float16)
    assert np.array_equal(round_once(x, torch.float16).numpy().view(np.uint16), want.view(np.uint16))


@pytest.mark.parametrize("dtype", DTYPES)
def test_round_once_keeps_infinity_nan_and_zero(dtype):
    x = torch.tensor([torch.inf, -torch.inf, torch.nan, 0.0, -0.0], dtype=torch.float64)
    got = round_once(x, dtype)
    assert got[:2].tolist() == [torch.inf, -torch.inf]
    assert got[2].isnan()
    assert torch.signbit(got[3:]).tolist() == [False, True]


def test_round_once_refuses_other_types():
    with pytest.raises(TypeError, match="takes float64"):
        round_once(torch.zeros(1), torch.bfloat16)
    with pytest.raises(TypeError, match="cannot round"):
        round_once(torch.zeros(1, dtype=torch.float64), torch.int32)


def test_codes_are_whole_and_in_range():
    whole = torch.tensor([-128.0, 0.0, 127.0], dtype=torch.float64)
    assert torch.equal(round_once(whole, torch.int8), torch.tensor([-128, 0, 127], dtype=torch.int8))
    for wrong in (0.5, 128.0, float("nan")):
        with pytest.raises(ValueError, match="no int8"):
            round_once(torch.tensor([wrong], dtype=torch.float64), torch.int8)


def place_of(factors, first, inner):
    info = TensorInfo(torch.bfloat16, tuple(factors.shape), "", 0, 0)
    return *Scale("", info, 0, factors).factors, first, inner


def raw(x: torch.Tensor) -> np.ndarray:
    return x.contiguous().view(torch.uint8).numpy().view(BITS[x.dtype.itemsize]).ravel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 3])
@pytest.mark.parametrize("first", [0, 7])
def test_kernel_equals_reference_bit_for_bit(dtype, inner, first):
    x = every_value(dtype).repeat_interleave(2)
    by = FACTORS[(torch.arange(x.numel()) + first) // inner % len(FACTORS)]
    want = round_once(x.double() * by, dtype)
    got = np.empty_like(raw(x))
    over, under = scale(raw(x), *place_of(FACTORS, first, inner), got, *FORMATS[dtype])
    numbers = ~want.isnan().numpy()
    assert np.array_equal(got[numbers], raw(want)[numbers])
    assert torch.from_numpy(got.view(np.uint8)).view(dtype)[~numbers].isnan().all()
    finite = x.isfinite()
    assert Lost(over, under) == lost(x[finite], (x.double() * by)[finite], want[finite])
    wrong = check(raw(x), *place_of(FACTORS, first, inner), got, *FORMATS[dtype])
    assert wrong == int((~numbers).sum())


@pytest.mark.parametrize("dtype", DTYPES)
def test_check_notices_every_single_wrong_value(dtype):
    x = every_value(dtype)
    x = x[x.isfinite()]
    place = place_of(FACTORS, 0, 1)
    right = np.empty_like(raw(x))
    scale(raw(x), *place, right, *FORMATS[dtype])
    sign = right.dtype.type(1 << (8 * right.itemsize - 1))
    for wrong in (right + right.dtype.type(1), right - right.dtype.type(1), right ^ sign):
        assert check(raw(x), *place, wrong, *FORMATS[dtype]) == x.numel()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inner", [1, 5])
def test_every_road_gives_the_same_bits_and_verdicts(dtype, inner):
    """Chunks of weights as they are, in which most take the shortest road, with one odd value here and there."""
    generator = torch.Generator().manual_seed(0)
    x = (0.02 * torch.randn(300_000, generator=generator)).to(dtype)
    x[::7001] = torch.tensor([0.0, -0.0, 1e-40, 3e38, 1e-7, -6e-5]).to(dtype).repeat(8)[: x[::7001].numel()]
    x = x[x.isfinite()]
    factors = 0.5 + torch.rand(1024, dtype=torch.float64, generator=generator)
    factors[:64] = 1 + torch.randint(-9, 9, (64,), generator=generator) * 2.0 ** -torch.arange(10, 74).double().clamp(
        max=52
    )
    place = place_of(factors, 3, inner)
    assert place[1].size
    by = factors[(torch.arange(x.numel()) + 3) // inner % 1024]
    want = raw(round_once(x.double() * by, dtype))
    for narrow in (place[1], place[1][:0]):
        got = np.empty_like(want)
        args = (place[0], narrow, *place[2:])
        scale(raw(x), *args, got, *FORMATS[dtype])
        assert np.array_equal(got, want)
        assert check(raw(x), *args, want, *FORMATS[dtype]) == 0
        spots = torch.randint(x.numel(), (50,), generator=generator).unique().numpy()
        for change in (1, -1, 1 << (8 * want.itemsize - 1)):
            wrong = want.copy()
            wrong[spots] = (wrong[spots].astype(np.int64) + change).astype(want.dtype)
            assert check(raw(x), *args, wrong, *FORMATS[dtype]) == len(spots)


def test_counting_kernels():
    x = torch.tensor([1.0, torch.inf, -torch.inf, torch.nan, 0.0, 65504.0], dtype=torch.float16)
    assert count_nonfinite(raw(x), np.uint16(0x7C00)) == 3
    assert count_different(raw(x), raw(x.flip(0))) == 6
    assert count_different(raw(x), raw(x)) == 0


def test_only_float16_is_refused_for_underflow():
    assert Lost(0, 3).reason(torch.bfloat16) is None
    assert "3 become subnormal" in (Lost(0, 3).reason(torch.float16) or "")
    assert "2 overflow" in (Lost(2, 0).reason(torch.bfloat16) or "")
