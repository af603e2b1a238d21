"""The report per norm against a table labelled by hand from the modeling code."""

import pytest
import torch.nn.functional as F
from scales import L, hand_made, some, traced
from torch import nn

from taut.norm_report import norm_report

FREE, CAN, NEVER = "free", "can be made free", "never free"
# Two layers each: the verdicts in the order of the norms, and what the last one needs.
TABLE = {
    "llama": ([FREE] * 4 + [CAN], ("--outputs logits",)),
    "vit": ([FREE] * 4 + [CAN], ("--outputs logits",)),
    "qwen3": ([FREE, NEVER, NEVER, FREE] * 2 + [CAN], ("--outputs logits",)),  # norms of queries and keys: attention
    "gemma2": ([FREE, NEVER] * 4 + [CAN], ("--untie", "--outputs logits")),  # norms behind a block: the residual
    "gpt2": ([CAN] * 4 + [NEVER], ()),  # tied; the final norm's bias finds none in the head
    "bert": ([NEVER] * 6, ()),  # behind blocks
}


@pytest.mark.parametrize("name", some(TABLE))
def test_verdicts_are_those_labelled_by_hand(name):
    reports = norm_report(traced(name)[1])
    verdicts, needs = TABLE[name]
    assert [report.verdict for report in reports] == verdicts
    assert reports[-1].needs == needs
    for report in reports:
        assert bool(report.kept) == (report.verdict == NEVER)


def test_reasons_and_remedies_are_named():
    reports = {report.where: report for report in norm_report(traced("qwen3")[1])}
    query = reports["model.layers.0.self_attn.q_norm"]
    assert query.removed == {"gain": "fold_qk_norm_gain"}
    assert "attention" in query.kept["division"]
    tied = {report.where: report for report in norm_report(traced("gpt2")[1])}
    assert tied["transformer.h.0.ln_1"].needs == ("--untie",)
    assert tied["transformer.h.0.ln_1"].removed["mean"] == "center_norm_input"
    assert "has a bias" in tied["transformer.ln_f"].kept["gain"]
    assert set(tied["transformer.ln_f"].as_dict()) >= {"where", "verdict", "needs", "kept"}


def verdicts(body, **layers):
    return [report.verdict for report in norm_report(hand_made(body, **layers)[1])]


def test_one_more_reader_or_a_relu_in_front_makes_it_costly():
    layers = {"a": L(16, 16), "n": nn.LayerNorm(16), "b": L(16, 16)}
    assert verdicts(lambda m, x: m.b(m.n(m.a(x))), **layers) == [FREE]
    assert verdicts(lambda m, x: m.b(m.n(h := m.a(x))) + h, **layers) == [NEVER]
    assert verdicts(lambda m, x: m.b(m.n(m.a(x).relu())), **layers) == [NEVER]
    assert verdicts(lambda m, x: m.b(m.n(m.a(x))) + F.relu(m.n(x)), **layers) == [NEVER, NEVER]


def test_the_graph_stays_as_it_is():
    lifted = traced("gpt2")[1]
    before = str(lifted)
    norm_report(lifted)
    assert str(lifted) == before
