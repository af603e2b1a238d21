"""Microscaling formats, bit for bit against exact rational arithmetic and against torch's own float8 casts."""

from fractions import Fraction

import pytest
import torch

from taut.formats.block_floating_point import bfp_quantize
from taut.formats.microscaling import MX, MXFP4, MXFP6, MXFP6_E3M2, MXFP8, MXFP8_E5M2
from taut.formats.minifloat import E2M1, E2M3, E3M2, E4M3, E5M2, Minifloat
from taut.formats.nvfp4 import NVFP4

ELEMENTS = [E5M2, E4M3, E3M2, E2M3, E2M1]
FORMS = [MXFP8, MXFP8_E5M2, MXFP6, MXFP6_E3M2, MXFP4]


def magnitudes(element: Minifloat) -> list[Fraction]:
    """Every finite magnitude of a format in the order of its codes, from the format's definition."""
    bias, fields = 2 ** (element.exponent_bits - 1) - 1, 2**element.exponent_bits
    values = []
    for code in range(fields * 2**element.mantissa_bits):
        field, mantissa = divmod(code, 2**element.mantissa_bits)
        fraction = Fraction(mantissa, 2**element.mantissa_bits) + (field > 0)
        values.append(fraction * Fraction(2) ** (max(field, 1) - bias))
    return [v for v in values if v <= element.largest]


def nearest_code(value: Fraction, grid: list[Fraction]) -> int:
    """Code of the nearest magnitude, ties to the even code; values beyond the grid saturate."""
    return min(range(len(grid)), key=lambda c: (abs(grid[c] - abs(value)), c % 2))


def floor_log2(value: Fraction) -> int:
    exponent = value.numerator.bit_length() - value.denominator.bit_length()
    return exponent if Fraction(2) ** exponent <= value else exponent - 1


def slow_quantize(block: list[float], form: MX) -> tuple[int, list[int]]:
    """One block in exact arithmetic: (E8M0 code, signed element codes)."""
    grid = magnitudes(form.element)
    values = [Fraction(v) for v in block]
    top = max(abs(v) for v in values)
    exponent = -127 if top == 0 else max(-127, min(127, floor_log2(top) - floor_log2(grid[-1])))
    sign = 2 ** (form.element.bits - 1)
    codes = [nearest_code(v / Fraction(2) ** exponent, grid) for v in values]
    return exponent + 127, [c + sign * (torch.tensor(v).signbit().item()) for c, v in zip(codes, block, strict=True)]


def awkward(rows: int, columns: int) -> torch.Tensor:
    """Numbers of very different size, with zeros, subnormal numbers and exact ties among them."""
    x = torch.randn(rows, columns) * torch.exp2(torch.randint(-40, 40, (rows, 1)).float())
    x[0] = 0.0
    x[1, :8] = torch.tensor([1e-45, -1e-39, 3e38, -3.4e38, 2.5, 0.25, -0.75, 1.25])
    x[2] = torch.randint(-64, 65, (columns,)) / 8
    x[3] *= 1e-44 / x[3].abs().amax()
    return x


@pytest.mark.parametrize("element", ELEMENTS, ids=lambda e: e.name)
def test_every_code_decodes_to_its_definition_and_encodes_back(element):
    grid = magnitudes(element)
    codes = torch.arange(len(grid), dtype=torch.uint8)
    both = torch.cat([codes, codes + 2 ** (element.bits - 1)])
    values = element.decode(both)
    assert [Fraction(v) for v in values.tolist()] == grid + [-v for v in grid]
    assert torch.equal(element.encode(values), both)


@pytest.mark.parametrize("form", FORMS, ids=lambda f: f.element.name)
def test_mx_is_bit_exact_against_rational_arithmetic(form):
    torch.manual_seed(0)
    x = awkward(12, 64)
    scales, codes, _ = form.quantize(x)
    for row in range(len(x)):
        for block in range(2):
            part = slice(32 * block, 32 * block + 32)
            want = slow_quantize(x[row, part].tolist(), form)
            assert (scales[row, block].item(), codes[row, part].tolist()) == want


@pytest.mark.parametrize(("element", "dtype"), [(E4M3, torch.float8_e4m3fn), (E5M2, torch.float8_e5m2)])
def test_elements_round_as_torch_does(element, dtype):
    x = torch.cat([torch.randn(20000) * 100, torch.randn(20000) * 1e-2]).clamp(-element.largest, element.largest)
    assert torch.equal(element.round(x), x.to(dtype).float())
    assert torch.equal(element.encode(element.round(x)), x.to(dtype).view(torch.uint8))


def test_scales_read_as_torch_reads_e8m0():
    quantized = MXFP8.quantize(awkward(64, 64))
    scales = quantized.scales.view(torch.float8_e8m0fnu).float().repeat_interleave(32, -1)
    values = quantized.codes.view(torch.float8_e4m3fn).float()
    assert torch.equal(MXFP8.dequantize(quantized), values * scales)


def test_nan_and_infinity_make_their_block_nan_and_no_other():
    x = torch.ones(2, 64)
    x[0, 3], x[1, 40] = torch.nan, torch.inf
    got = MXFP8.dequantize(MXFP8.quantize(x))
    assert got[0, :32].isnan().all()
    assert got[1, 32:].isnan().all()
    assert torch.equal(got[0, 32:], x[0, 32:])


def test_what_does_not_divide_into_blocks_is_refused():
    with pytest.raises(ValueError, match="pad them"):
        MXFP8.quantize(torch.ones(40))


def slow_nvfp4(x: torch.Tensor) -> tuple[float, list[int], list[int]]:
    """A row in exact arithmetic, given the tensor's float32 scale."""
    scale = (x.abs().amax().double() / 2688).float()
    eight, four = magnitudes(E4M3), magnitudes(E2M1)
    scales, codes = [], []
    for block in x.view(-1, 16).tolist():
        top = max(abs(Fraction(v)) for v in block)
        scales.append(nearest_code(top / 6 / Fraction(scale.item()), eight))
        step = eight[scales[-1]] * Fraction(scale.item())
        code = [nearest_code(Fraction(v) / step, four) if step else 0 for v in block]
        negative = [step != 0 and torch.tensor(v).signbit().item() for v in block]
        codes += [c + 8 * n for c, n in zip(code, negative, strict=True)]
    return scale.item(), scales, codes


@pytest.mark.parametrize("seed", range(3))
def test_nvfp4_is_bit_exact_against_rational_arithmetic(seed):
    torch.manual_seed(seed)
    x = torch.randn(1024) * torch.exp2(torch.randint(-12, 12, (64, 1)).float()).expand(64, 16).reshape(-1)
    x[:16] = 0
    x[16:32] = torch.randint(-24, 25, (16,)) / 4
    got = NVFP4().quantize(x)
    assert (got.scale.item(), got.scales.tolist(), got.codes.tolist()) == slow_nvfp4(x)
    exact = [Fraction(v) for v in NVFP4().dequantize(got, torch.float64).tolist()]
    eight, four = magnitudes(E4M3), magnitudes(E2M1)
    steps = [eight[s] * Fraction(got.scale.item()) for s in got.scales.tolist() for _ in range(16)]
    assert exact == [(-1) ** (c >> 3) * four[c & 7] * s for c, s in zip(got.codes.tolist(), steps, strict=True)]


@pytest.mark.parametrize("bits", [4, 6, 8])
def test_block_floating_point_error_is_within_one_unit_of_the_largest(bits):
    torch.manual_seed(0)
    x = torch.randn(500, 40) * torch.exp2(torch.randint(-20, 20, (500, 1)).float())
    x[0], x[1] = 1.999999, -2.0
    error = torch.nn.functional.pad((bfp_quantize(x, 16, bits) - x).abs(), (0, 8)).view(500, 3, 16).amax(-1)
    largest = torch.nn.functional.pad(x.abs(), (0, 8)).view(500, 3, 16).amax(-1)
    assert (error <= 2.0 ** (1 - bits) * largest).all()
    assert error.max() > 0


def test_block_floating_point_is_idempotent():
    x = bfp_quantize(torch.randn(100, 32), 16, 8)
    assert torch.equal(bfp_quantize(x, 16, 8), x)


@pytest.mark.parametrize("form", [*FORMS, NVFP4()], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_rounding_is_what_the_codes_say_bit_for_bit(form, dtype):
    torch.manual_seed(0)
    x = awkward(12, 64).to(dtype)
    x = x[4:] if isinstance(form, NVFP4) else torch.cat([x, torch.full((1, 64), torch.inf).to(dtype)])
    want = form.dequantize(form.quantize(x), dtype)
    got = form.round(x)
    assert torch.equal(got.nan_to_num(7.0), want.nan_to_num(7.0))
    assert torch.equal(got.signbit(), want.signbit())
