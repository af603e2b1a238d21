import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from twice import as_accurate

from taut.nn.norm.rms_norm import RMSNorm


def with_weight(norm, weight):
    norm = norm.to(weight.dtype)
    with torch.no_grad():
        norm.weight.copy_(weight)
    return norm


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("theirs", "ours"),
    [(LlamaRMSNorm, {}), (GemmaRMSNorm, {"gain": "one_plus", "order": "gain_then_cast"})],
    ids=["llama", "gemma"],
)
def test_same_bits_as_the_models_that_people_run(theirs, ours, dtype):
    torch.manual_seed(0)
    x, weight = (torch.randn(64, 256) * 3).to(dtype), torch.randn(256).to(dtype)
    want = with_weight(theirs(256, eps=1e-6), weight)(x)
    assert torch.equal(with_weight(RMSNorm(256, 1e-6, **ours), weight)(x), want)


def test_the_orders_differ_in_bfloat16():
    torch.manual_seed(0)
    x, weight = torch.randn(64, 256).bfloat16(), torch.randn(256).bfloat16()
    results = [with_weight(RMSNorm(256, order=o), weight)(x) for o in ("cast_then_gain", "gain_then_cast")]
    assert not torch.equal(*results)


def test_is_torch_rms_norm():
    x = torch.randn(8, 64, dtype=torch.float64)
    weight = torch.randn(64, dtype=torch.float64)
    got = with_weight(RMSNorm(64, 1e-6, order="gain_then_cast"), weight)(x)
    torch.testing.assert_close(got, F.rms_norm(x, (64,), weight, 1e-6), rtol=1e-14, atol=1e-14)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    "arguments", [{}, {"eps": 1e-3}, {"elementwise_affine": False}, {"eps": None, "elementwise_affine": True}], ids=str
)
def test_stands_in_for_torch_s_with_its_arguments_and_its_weights(arguments, dtype):
    torch.manual_seed(0)
    theirs = torch.nn.RMSNorm((64,), **arguments, device="cpu", dtype=dtype)
    ours = RMSNorm((64,), **{"eps": None} | arguments, order="gain_then_cast", device="cpu", dtype=dtype)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter)
    ours.load_state_dict(theirs.state_dict())
    x = 1e-3 * torch.randn(8, 64)  # small enough for epsilon to show
    truth = theirs.double()(x.to(dtype).double()) if arguments.get("eps") else None
    got, want = ours(x.to(dtype)), theirs.to(dtype)(x.to(dtype))
    assert got.dtype == dtype
    assert torch.equal(got, want) if truth is None else as_accurate(got, want, truth)


@pytest.mark.parametrize(
    ("arguments", "reason"),
    [
        ({"d": (4, 16)}, "flatten them first"),
        ({"d": 64, "order": "gain_first"}, "cast_then_gain or gain_then_cast"),
        ({"d": 64, "eps_mode": "on top"}, "inside or outside"),
        ({"d": 64, "gain": "two"}, "plain or one_plus or none"),
    ],
)
def test_refuses_what_it_does_not_know(arguments, reason):
    with pytest.raises(ValueError, match=reason):
        RMSNorm(**arguments)


@pytest.mark.parametrize("options", [{}, {"gain": "none"}, {"partial": 0.25, "gain": "none"}], ids=str)
def test_refuses_inputs_of_another_width(options):
    with pytest.raises(ValueError, match="of 64 features, and x has 63"):
        RMSNorm(64, **options)(torch.randn(2, 63))


def test_epsilon_outside_the_root():
    x = torch.randn(8, 64, dtype=torch.float64) * 1e-3
    got = RMSNorm(64, 1e-2, eps_mode="outside", gain="none")(x)
    assert torch.equal(got, x / (x.pow(2).mean(-1, keepdim=True).sqrt() + 1e-2))


def test_partial_measures_the_first_features_and_divides_all():
    torch.manual_seed(0)
    x = torch.randn(8, 64, dtype=torch.float64)
    norm = RMSNorm(64, 0.0, gain="none", partial=0.0625)
    assert torch.equal(norm(x), x * torch.rsqrt(x[:, :4].pow(2).mean(-1, keepdim=True)))


@pytest.mark.parametrize("partial", [1.0, 0.0625])
def test_scaling_inputs_or_weights_changes_nothing_and_shifting_them_does(partial: float):
    """Table 1 of the paper, for norm(x W): powers of two change no bit, other factors no more than rounding."""
    torch.manual_seed(0)
    x, weight = torch.randn(8, 32).double(), torch.randn(32, 64).double()
    norm = RMSNorm(64, 0.0, gain="none", partial=partial)
    y = norm(x @ weight)
    assert torch.equal(norm((8.0 * x) @ weight), y)
    assert torch.equal(norm(x @ (0.25 * weight)), y)
    torch.testing.assert_close(norm(x @ (3.7 * weight)), y, rtol=1e-13, atol=1e-13)
    for moved in (x @ (weight + 1), (x + 1) @ weight):
        assert (norm(moved) - y).norm() > 0.1 * y.norm()


def test_partial_of_everything_is_the_whole():
    x = torch.randn(8, 64)
    assert torch.equal(RMSNorm(64, partial=1.0)(x), RMSNorm(64)(x))


@pytest.mark.parametrize("share", [0.0, 0.01, 1.5])
def test_refuses_a_share_that_measures_nothing_or_too_much(share):
    with pytest.raises(ValueError, match="partial"):
        RMSNorm(64, partial=share)
