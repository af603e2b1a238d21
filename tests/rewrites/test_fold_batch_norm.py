"""fold_batch_norm: vision models, torch's own fusion, every kind of layer, and every reason to refuse."""

import pytest
import scales
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_weights, fuse_linear_bn_weights

from taut.lift import lift
from taut.nn.mixer.conformer import ConformerBlock
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.fold_batch_norm import fold_batch_norm
from taut.shrink import example_inputs, tiny_model
from taut.tracing import trace

aten = torch.ops.aten
W = scales.WIDTH

# Batch norms counted by hand from the modeling code at the twin's sizes; all fold.
MODELS = {
    "MobileNetV1ForImageClassification": 27,
    "ResNetForImageClassification": 29,
    "RegNetForImageClassification": 29,
    "MobileNetV2ForImageClassification": 52,
    "LevitForImageClassification": 39,
}


def settled(norm: nn.Module) -> nn.Module:
    """A batch norm that has seen data."""
    generator = torch.Generator().manual_seed(5)
    norm.running_mean.copy_(torch.randn(norm.running_mean.shape, generator=generator))
    norm.running_var.copy_(torch.rand(norm.running_var.shape, generator=generator) + 0.2)
    return norm


def norms(graph) -> int:
    return len(list(graph.calls(aten.batch_norm.default, aten._native_batch_norm_legit_no_training.default)))


@pytest.mark.parametrize(
    "name", [name if "V1" in name else pytest.param(name, marks=pytest.mark.slow) for name in MODELS]
)
def test_vision_models(name):
    import transformers

    model = tiny_model(getattr(transformers, name))
    inputs = [example_inputs(model, seed=seed) for seed in range(2)]
    raw = trace(model, inputs[0])
    lifted = lift(raw)
    sites = fold_batch_norm.find(lifted)
    assert [site.refused for site in sites] == [None] * MODELS[name]
    folded = fold_batch_norm.apply(lifted)
    assert norms(folded) == 0
    assert not any("running" in name for name in folded.placeholders("buffer"))
    evidence = prove(raw, folded, inputs)
    assert evidence.float64_error <= 1e-12
    assert not evidence.unproved
    # Its two logits cancel down to where one rounding is worth several of another; see the float64 error.
    assert evidence.passed or name.startswith("Levit"), evidence


def images(x):
    return x.unflatten(-1, (4, 4))


LAYERS = {
    "linear": (nn.Linear(W, 8), nn.BatchNorm1d(8), lambda x: x.flatten(0, 1)),
    "no bias": (nn.Linear(W, 8, bias=False), nn.BatchNorm1d(8), lambda x: x.flatten(0, 1)),
    "1 x 1": (nn.Conv2d(6, 8, 1), nn.BatchNorm2d(8), images),
    "k x k, padded, strided": (nn.Conv2d(6, 8, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(8), images),
    "depthwise": (nn.Conv2d(6, 12, 3, groups=6, padding=1), nn.BatchNorm2d(12), images),
    "grouped": (nn.Conv1d(6, 12, 3, groups=3, dilation=2), nn.BatchNorm1d(12), lambda x: x),
    "no gain": (nn.Conv1d(6, 12, 3), nn.BatchNorm1d(12, affine=False), lambda x: x),
}


@pytest.mark.parametrize("case", LAYERS)
def test_agrees_with_torch_on_every_kind_of_layer(case):
    layer, norm, view = LAYERS[case]
    raw, lifted, inputs = scales.hand_made(lambda m, x: m.norm(m.layer(view(x))), layer=layer, norm=settled(norm))
    folded = fold_batch_norm.apply(lifted)
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence
    fuse = fuse_linear_bn_weights if isinstance(layer, nn.Linear) else fuse_conv_bn_weights
    own = [None if p is None else p.double() for p in (layer.weight, layer.bias)]
    gain, bias = (None if p is None else p.double() for p in (norm.weight, norm.bias))
    statistics = norm.running_mean.double(), norm.running_var.double()
    wanted = fuse(own[0], own[1], *statistics, norm.eps, gain, bias)
    for name, tensor in zip(("layer.weight", "layer.bias"), wanted, strict=True):
        assert torch.allclose(folded.evaluate(name), tensor, rtol=1e-14, atol=1e-14)
    assert set(folded.values) == {"layer.weight", "layer.bias"}
    assert norms(folded) == 0


def test_a_conformer_block_keeps_no_norm():
    block = ConformerBlock(W, heads=2, kernel=3).eval()
    scales.redraw(block)
    for module in block.modules():
        if hasattr(module, "running_var"):
            settled(module)
    inputs = {"x": torch.randn(2, 6, W), "mask": torch.ones(2, 6, dtype=torch.bool).tril(4)}
    raw = trace(block, inputs)
    lifted = lift(raw)
    assert norms(lifted) == 9
    folded = fold_batch_norm.apply(lifted)
    assert norms(folded) == 0
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence


LATER = {
    "a linear layer behind an activation": (lambda m, x: m.l(m.n(x.relu().mT).mT), {"l": nn.Linear(W, 8)}),
    "without a bias": (lambda m, x: m.l(m.n(x.relu().mT).mT), {"l": nn.Linear(W, 8, bias=False)}),
    "an unpadded convolution": (lambda m, x: m.l(m.n(x.relu().mT)), {"l": nn.Conv1d(W, 8, 3)}),
    "two readers": (
        lambda m, x: (lambda y: m.l(y) + m.k(y))(m.n(x.relu().mT).mT),
        {"l": nn.Linear(W, 8), "k": nn.Linear(W, 8)},
    ),
}


@pytest.mark.parametrize("case", LATER)
def test_layers_behind_a_norm_take_it_where_none_in_front_can(case):
    body, layers = LATER[case]
    raw, lifted, inputs = scales.hand_made(body, n=settled(nn.BatchNorm1d(W)), **layers)
    folded = fold_batch_norm.apply(lifted)
    assert norms(folded) == 0
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence


REFUSED = {
    "in front of a padded convolution": (lambda m, x: m.pad(m.n(x.relu().mT)), "pads its input with zeros"),
    "read by an activation": (lambda m, x: m.n(x.relu().mT).relu(), "relu"),
    "a layer that is read twice": (lambda m, x: m.n(h := m.l(x).mT) + h, "also read by add"),
    "a layer that is used twice": (lambda m, x: m.n(m.l(x).mT) + m.l(x.relu()).mT, "is also read by linear"),
    "an input": (lambda m, x: m.n(x.mT), "the input x"),
    "over another axis": (lambda m, x: m.six(m.l(x)), "not the outputs of linear"),
    "statistics of the batch": (lambda m, x: F.batch_norm(m.l(x).mT, None, None, training=True), "from the batch"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words(case):
    body, reason = REFUSED[case]
    layers = {"l": nn.Linear(W, W), "pad": nn.Conv1d(W, 8, 3, padding=1), "six": settled(nn.BatchNorm1d(6))}
    raw, lifted, inputs = scales.hand_made(body, n=settled(nn.BatchNorm1d(W)), **layers)
    (site,) = fold_batch_norm.find(lifted)
    assert reason in site.refused
    assert fold_batch_norm.find(lifted, STOCK) == []
    assert prove(raw, fold_batch_norm.apply(lifted), [inputs]).passed
