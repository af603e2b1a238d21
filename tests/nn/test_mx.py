import pytest
import torch
import torch.nn.functional as F
from torch import nn
from twice import as_accurate, rounded_as_accurately

from taut.formats.microscaling import MX, MXFP4, MXFP8
from taut.formats.minifloat import E4M3
from taut.formats.nvfp4 import NVFP4
from taut.nn.norm.mx import MXNorm, gaussian_constant

from .char_lm import held_out_loss, train


def relative_rms(norm: MXNorm, x: torch.Tensor) -> torch.Tensor:
    return (norm.rms(x) / x.pow(2).mean(-1, keepdim=True).sqrt()).flatten()


@pytest.mark.parametrize(("p", "block", "want"), [(1, 16, 0.4815), (2, 16, 0.4690), (1, 32, 0.4260), (2, 32, 0.4183)])
def test_constants_of_the_normal_distribution(p, block, want):
    assert gaussian_constant(p, block) == pytest.approx(want, rel=1e-3)
    torch.manual_seed(0)
    maxima = torch.randn(200_000, block).abs().amax(-1)
    assert gaussian_constant(p, block) == pytest.approx(maxima.pow(p).mean().pow(-1 / p).item(), rel=2e-3)


@pytest.mark.parametrize(("d", "largest"), [(1024, 0.03), (2048, 0.02), (4096, 0.015)])
def test_estimate_is_unbiased_and_tight_on_normal_inputs(d, largest):
    torch.manual_seed(0)
    ratio = relative_rms(MXNorm(d), torch.randn(2000, d))
    assert ratio.std() <= largest
    assert ratio.mean() == pytest.approx(1, abs=3e-3)


ONE_BLOCK, FOUR_BLOCKS = [4, 5, 6, 7], [5, 900, 2100, 4000]


@pytest.mark.parametrize(
    ("channels", "p", "bias"),
    [(ONE_BLOCK, 2, 0.58), (ONE_BLOCK, 1, -0.29), (FOUR_BLOCKS, 2, 0.97), (FOUR_BLOCKS, 1, -0.15)],
)
def test_outlier_channels_mislead_it_until_it_is_calibrated(channels, p, bias):
    torch.manual_seed(0)
    x = torch.randn(2000, 4096)
    x[:, channels] *= 50
    norm = MXNorm(4096, p=p)
    assert relative_rms(norm, x).mean() == pytest.approx(1 + bias, abs=0.02)
    norm.calibrate([x[:1000]])
    assert relative_rms(norm, x[1000:]).mean() == pytest.approx(1, abs=0.02)
    truth = x.double().square().mean(-1, keepdim=True).sqrt()
    assert as_accurate(MXNorm(4096, 0.0, estimate="exact").rms(x), x.square().mean(-1, keepdim=True).sqrt(), truth)


def test_heavy_tails_mislead_it():
    torch.manual_seed(0)
    x = torch.distributions.StudentT(4.0).sample((1000, 4096))
    assert relative_rms(MXNorm(4096), x).mean() == pytest.approx(1.36, abs=0.03)


@pytest.mark.parametrize("form", [MXFP8, MXFP4, MX(E4M3, 16), NVFP4()], ids=str)
def test_with_the_true_rms_it_is_the_quantized_rms_norm(form):
    torch.manual_seed(0)
    x = torch.randn(50, 128)
    norm = MXNorm(128, form=form, estimate="exact")
    want = form.quantize(x * (1 / (x.pow(2).mean(-1, keepdim=True) + 1e-6).sqrt()))
    got = norm.quantized(x)
    assert torch.equal(got.scales, want.scales)
    assert torch.equal(got.codes, want.codes)


@pytest.mark.parametrize("form", [MXFP8, MXFP4, NVFP4()], ids=str)
def test_forward_is_what_the_codes_say(form):
    torch.manual_seed(0)
    x = torch.randn(50, 128)
    norm = MXNorm(128, form=form)
    assert torch.equal(norm(x), form.dequantize(norm.quantized(x)))


def test_gradient_is_that_of_rms_norm_where_the_estimate_is_exact():
    torch.manual_seed(0)
    x, upstream = torch.randn(50, 128, dtype=torch.float64, requires_grad=True), torch.randn(50, 128).double()
    (got,) = torch.autograd.grad(MXNorm(128, 0.0, estimate="exact")(x), x, upstream)
    (want,) = torch.autograd.grad(F.rms_norm(x, (128,), eps=0.0), x, upstream)
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("estimate", ["blocks", "exact"])
def test_gradient_passes_straight_through_and_knows_the_estimate(estimate):
    torch.manual_seed(0)
    x, upstream = torch.randn(50, 128, dtype=torch.float64, requires_grad=True), torch.randn(50, 128).double()
    norm = MXNorm(128, estimate=estimate)
    rho = 1 / norm.rms(x).detach()
    y = x.detach() * rho
    (got,) = torch.autograd.grad(norm(x), x, upstream)
    want = rho * (upstream - y * (upstream * y).mean(-1, keepdim=True))
    torch.testing.assert_close(got, want, rtol=1e-12, atol=1e-12)


def test_refuses_widths_that_leave_part_of_a_block():
    with pytest.raises(ValueError, match="blocks of 32"):
        MXNorm(48)


def test_refuses_an_unknown_estimate():
    with pytest.raises(ValueError, match="blocks or exact, not 'exactly'"):
        MXNorm(64, estimate="exactly")


@pytest.mark.gpu
@pytest.mark.parametrize("form", [MXFP8, MXFP4, NVFP4()], ids=str)
def test_compiled_for_a_gpu_it_is_the_plain_norm(form):
    torch.manual_seed(0)
    x = torch.randn(512, 320, device="cuda") * torch.rand(320, device="cuda").exp()
    x.requires_grad_()
    upstream, norm = torch.randn_like(x), MXNorm(320, form=form).cuda()
    plain, compiled = norm(x), torch.compile(norm, fullgraph=True)(x)
    (want,), (got,) = (torch.autograd.grad(y, x, upstream) for y in (plain, compiled))
    wide = x.detach().double().requires_grad_()
    nearest, unrounded = norm.double()(wide), wide.detach() / norm.rms(wide.detach())
    (truth,) = torch.autograd.grad(nearest, wide, upstream.double())
    assert as_accurate(got, want, truth)
    # The last bit of the RMS may move a number that lies between two of the grid, and no other.
    before_rounding = x.detach() / norm.float().rms(x.detach())
    on_cpu = norm.cpu()(x.detach().cpu()).cuda()
    for got in (plain, compiled, on_cpu):
        assert rounded_as_accurately(got, nearest, unrounded, before_rounding)


@pytest.mark.slow
def test_trains_as_well_as_rms_norm():
    seeds = range(3)
    plain = [held_out_loss(train(lambda d: nn.RMSNorm(d, 1e-6), seed)) for seed in seeds]
    blocks = [held_out_loss(train(MXNorm, seed)) for seed in seeds]
    assert sum(plain) / 3 < 2.6
    assert sum(blocks) == pytest.approx(sum(plain), rel=0.01)
