"""Which norms of six kinds of models fold: labelled by hand from the modeling code, and every yes proved."""

import sys
from pathlib import Path

import pytest

from taut.norm_report import DIVISION, GAIN, MEAN, norm_report
from taut.proof import prove
from taut.rewrite import rewrites

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

from foldable_table import graphs, role

# gain, mean and division of each norm in the order of the model: which ones go; several calls of a module as one.
TABLE = {
    "GPT-2": [("h.ln_1", "gmd"), ("h.ln_2", "gmd")] * 2 + [("transformer.ln_f", "m")],  # a head without bias
    "BERT": [
        ("embeddings.LayerNorm", "m"),  # three tables write it and nothing else reads them
        *[("output.LayerNorm", "")] * 3,  # their readers are a block and the residual
        ("output.LayerNorm", "gd"),  # the last one is read by the head alone
        ("transform.LayerNorm", "gd"),  # behind a GELU
    ],
    "ViT": [("layers.layernorm_before", "gmd"), ("layers.layernorm_after", "gmd")] * 2 + [("vit.layernorm", "gmd")],
    "Swin": [
        ("embeddings.norm", "m"),  # read by the residual
        *[("blocks.layernorm_before", ""), ("blocks.layernorm_after", "gd")] * 2,  # the patch merging reads the stream
        ("downsample.norm", ""),  # reads four tokens side by side; no bias behind it
        *[("blocks.layernorm_before", "m"), ("blocks.layernorm_after", "gmd")] * 2,  # windows are padded
        ("swin.layernorm", "m"),  # pooled
    ],
    "ConvNeXt": [
        ("embeddings.layernorm", "m"),  # read by the residual
        *[("layers.layernorm", "gd")] * 2,  # behind a depthwise convolution
        ("stages.downsampling_layer", "g"),  # behind a scale per feature, before a strided convolution
        *[("layers.layernorm", "gd")] * 2,
        ("convnext.layernorm", "gd"),
    ],
    "LSTM with norms": [("norm_input", "m"), ("norm_state", "m"), ("norm_cell", "")] * 4,
}


@pytest.fixture(scope="module")
def models():
    return {kind: found for kind, *found in graphs()}


@pytest.mark.parametrize("kind", TABLE)
def test_what_folds_is_what_was_labelled_by_hand(models, kind: str):
    found = [
        (role(r.where), "".join(part[0] for part in (GAIN, MEAN, DIVISION) if part in r.removed))
        for r in norm_report(models[kind][1])
    ]
    assert found == TABLE[kind]


@pytest.mark.parametrize("kind", TABLE)
def test_what_folds_is_proved(models, kind: str):
    raw, graph, inputs = models[kind]
    for name in ("fold_norm", "center_norm_input", "defer_norm"):
        graph = rewrites()[name].apply(graph)
    assert graph.changed()
    evidence = prove(raw, graph, [inputs])
    assert evidence.passed, evidence
