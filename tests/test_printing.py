"""The printed graph: a layer in about a dozen lines, alike layers once, facts beside the nodes."""

import copy
import itertools
import re

import architectures
import pytest
from scales import traced

from taut.lift import lift
from taut.printing import columns, text
from taut.rewrites.center_norm_input import center_norm_input
from taut.rewrites.merge_linears import merge_linears
from taut.tracing import trace

LLAMA_LAYER = """
rms_norm = rms_norm(embedding, input_layernorm.weight)
linear_15 = linear(rms_norm, q_proj.weight)
linear_16 = linear(rms_norm, k_proj.weight)
linear_17 = linear(rms_norm, v_proj.weight)
rope = rope(linear_15[2,6,7,8], mul_1[1,1,7,8], mul_2[1,1,7,8])
rope_1 = rope(linear_16[2,2,7,8], mul_1[1,1,7,8], mul_2[1,1,7,8])
attention = attention(rope, rope_1, linear_17[2,2,7,8], and_2, scale=0.3535533905932738)
linear_18 = linear(attention[2,7,48], o_proj.weight)
add_6 = add(embedding, linear_18)
rms_norm_1 = rms_norm(add_6, post_attention_layernorm.weight)
linear_19 = linear(rms_norm_1, gate_proj.weight)
linear_20 = linear(rms_norm_1, up_proj.weight)
glu = glu(linear_19, linear_20)
linear_21 = linear(glu, down_proj.weight)
add_8 = add(add_6, linear_21)
""".strip().splitlines()


def numberless(call):
    return re.sub(r"_\d+\b", "", call)


def calls(printed):
    return [re.split(r"  +", line.strip())[0] for line in printed.splitlines()]


def test_a_llama_layer_is_fifteen_lines():
    printed = text(traced("llama")[1])
    lines = [numberless(call) for call in calls(printed)]
    wanted = [numberless(call) for call in LLAMA_LAYER]
    start = lines.index(wanted[0])
    assert lines[start : start + len(wanted)] == wanted


def test_layers_that_are_alike_are_printed_once():
    model = architectures.build("llama")
    config = copy.deepcopy(model.config)
    config.num_hidden_layers = 5
    config.layer_types = None
    deep = type(model)(config).eval()
    printed = text(lift(trace(deep, architectures.inputs(deep))))
    assert sum("q_proj.weight" in line for line in printed.splitlines()) == 1
    assert "model.layers.1 to model.layers.4 are like model.layers.0; the last value is add_" in printed
    last = re.search(r"the last value is (\w+)", printed)
    assert last is not None
    assert f"rms_norm({last[1]}, norm.weight" in printed.split("the last value")[1]


def test_layers_that_differ_are_not():
    printed = text(traced("deepseek_v3")[1])
    assert "are like" not in printed
    assert "is like" not in printed


def test_layers_on_other_masks_are_not_alike():
    """Gemma 2 alternates between two masks: all else is the same."""
    printed = text(traced("gemma2")[1])
    assert sum("q_proj.weight" in line for line in printed.splitlines()) == 2


@pytest.mark.parametrize("name", ["llama", "deepseek_v3", "gpt2_untied", "vit"])
def test_every_line_ends_in_its_shape_and_every_graph_prints(name):
    raw, lifted, _ = traced(name)
    for graph in (raw, lifted, merge_linears.apply(lifted)):
        for line in text(graph).splitlines():
            if " = " in line:
                assert re.search(r"  (\w+\[[\d,]*\]|\d+ tensors)(  +\S+)?$", line), line
    assert str(lifted) == text(lifted)


def test_module_paths_stand_where_they_change():
    lines = text(traced("llama")[1]).splitlines()
    paths = [found[1] for line in lines if (found := re.search(r"\]  +(\S+)$", line))]
    assert paths[:5] == ["model", "model.rotary_emb", "model.layers.0", "model.layers.0.self_attn", "model.layers.0"]
    assert all(a != b for a, b in itertools.pairwise(paths))


def test_facts_stand_in_columns():
    _, lifted, _ = traced("llama")
    printed = text(lifted, columns(lifted)).splitlines()
    assert printed[0].split()[-2:] == ["mean", "readers"]
    norm = next(line for line in printed if "input_layernorm.weight" in line)
    assert re.search(r"\s3\s+f32", norm)
    centred = center_norm_input.apply(traced("gpt2_untied")[1])
    norm = next(line for line in text(centred, columns(centred)).splitlines() if "c_proj.weight" in line)
    assert re.search(r"\szero\s+1\s+f32", norm)
