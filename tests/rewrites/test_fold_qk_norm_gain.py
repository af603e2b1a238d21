"""fold_qk_norm_gain: hand-counted sites, proof, both layouts of pairs, partial rotation, and every reason to refuse."""

import pytest
import scales
import torch
import torch.nn.functional as F
from torch import nn

import taut.rewrites.fold_qk_norm_gain as module
from taut.lift import lift
from taut.ops.rms_norm import rms_norm
from taut.ops.rope import rope
from taut.proof import prove
from taut.rewrite import STOCK, TAUT
from taut.rewrites.fold_norm import fold_norm
from taut.rewrites.fold_qk_norm_gain import fold_qk_norm_gain
from taut.shrink import example_inputs, tiny_model
from taut.tracing import trace

# By hand, two layers each: norms on queries and keys, and those whose gain goes into the tables.
SITES = {"qwen3": (4, 4), "gemma3": (4, 4), "olmo2": (4, 0), "llama": (0, 0)}
HEAD = 16


@pytest.mark.parametrize("name", scales.some(SITES))
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = scales.traced(name)
    sites = fold_qk_norm_gain.find(lifted)
    assert (len(sites), sum(site.refused is None for site in sites)) == SITES[name]
    assert all(site.refused for site in fold_qk_norm_gain.find(lifted, STOCK))
    folded = fold_qk_norm_gain.apply(lifted)
    without_gain = sum(norm.args[1] is None for norm in folded.calls(rms_norm))
    assert without_gain == SITES[name][1]
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence


def test_full_width_gains_are_refused_with_the_reason():
    site = fold_qk_norm_gain.find(scales.traced("olmo2")[1])[0]
    assert site.refused == "its gain differs from head to head, and the tables are the same for all heads"


def test_with_folding_no_gain_is_left_in_a_layer():
    raw, lifted, inputs = scales.traced("qwen3")
    folded = fold_qk_norm_gain.apply(fold_norm.apply(lifted))
    assert prove(raw, folded, [inputs]).passed


def test_where_nothing_is_rotated_the_query_gives_its_gain_to_the_key():
    """EXAONE 4 rotates in its layers with a window only."""
    import transformers

    model = tiny_model(transformers.Exaone4ForCausalLM)
    inputs = example_inputs(model)
    raw = trace(model, inputs)
    lifted = lift(raw)
    attention = "model.layers.1.self_attn"
    for form, applied in ((TAUT, 3), (STOCK, 1)):
        sites = {site.where: site for site in fold_qk_norm_gain.find(lifted, form)}
        assert sum(site.refused is None for site in sites.values()) == applied
        written = sites[f"{attention}.q_norm"].writes
        assert set(written) == {f"{attention}.q_norm.weight", f"{attention}.k_norm.weight"}
        folded = fold_qk_norm_gain.apply(lifted, form=form)
        assert torch.equal(folded.evaluate(f"{attention}.q_norm.weight"), torch.ones_like(folded.evaluate(written[0])))
        evidence = prove(raw, folded, [inputs])
        assert evidence.passed, evidence


class Heads(nn.Module):
    """Two heads of queries and one of keys, each normalised with a gain of its own; `turn` rotates what it is given."""

    def __init__(self, turn, q_norm=None, k_norm=None):
        super().__init__()
        self.turn = turn
        self.q, self.k = nn.Linear(HEAD, 2 * HEAD), nn.Linear(HEAD, HEAD)
        self.q_norm, self.k_norm = q_norm or nn.RMSNorm(HEAD, eps=1e-6), k_norm or nn.RMSNorm(HEAD, eps=1e-6)
        scales.redraw(self)

    def forward(self, x):
        q = self.q_norm(self.q(x).unflatten(-1, (2, HEAD))).transpose(1, 2)
        k = self.k_norm(self.k(x).unflatten(-1, (1, HEAD))).transpose(1, 2)
        q, k = self.turn(self, q), self.turn(self, k)
        return F.scaled_dot_product_attention(q, k.expand(-1, 2, -1, -1), x[:, None].expand(-1, 2, -1, -1))


def tables(rotary: int, interleaved: bool):
    angle = torch.arange(6.0)[:, None] / 3.0 ** torch.arange(rotary // 2)
    whole = angle.repeat_interleave(2, -1) if interleaved else torch.cat((angle, angle), -1)
    return whole.cos(), whole.sin()


def halves(x):
    return torch.cat((-x[..., x.shape[-1] // 2 :], x[..., : x.shape[-1] // 2]), -1)


def pairs(x):
    return torch.stack((-x[..., 1::2], x[..., ::2]), -1).flatten(-2)


def turning(rotary: int, interleaved: bool):
    def turn(_, x):
        cos, sin = tables(rotary, interleaved)
        part, rest = x[..., :rotary], x[..., rotary:]
        part = part * cos + (pairs if interleaved else halves)(part) * sin
        return part if rotary == HEAD else torch.cat((part, rest), -1)

    return turn


def graphs(model):
    inputs = {"x": torch.randn(2, 6, HEAD, generator=torch.Generator().manual_seed(3))}
    raw = trace(model.eval(), inputs)
    return raw, lift(raw), inputs


@pytest.mark.parametrize("interleaved", [False, True])
@pytest.mark.parametrize("rotary", [HEAD, HEAD // 2])
def test_every_layout_of_pairs_and_a_partial_rotation(rotary, interleaved):
    raw, lifted, inputs = graphs(Heads(turning(rotary, interleaved)))
    assert [node.args[3] for node in lifted.calls(rope)] == [interleaved] * 2
    sites = {site.where: site for site in fold_qk_norm_gain.find(lifted)}
    assert sites["q_norm"].refused is None
    if rotary == HEAD:
        assert sites["k_norm"].refused is None
    else:
        assert sites["k_norm"].refused == f"features from {rotary} on are not rotated and keep its gain"
        assert sites["q_norm"].writes == ("k_norm.weight",)
    folded = fold_qk_norm_gain.apply(lifted)
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence
    again = fold_qk_norm_gain.find(folded)
    assert all(site.refused for site in again)


@pytest.mark.parametrize("interleaved", [False, True])
def test_the_gain_of_the_partner_is_needed(interleaved, monkeypatch):
    """Multiplying the sine by a feature's own gain is another function, and the proof says so."""
    raw, lifted, inputs = graphs(Heads(turning(HEAD, interleaved)))
    monkeypatch.setattr(module, "_partners", lambda graph, gain, interleaved, before: gain)
    assert not prove(raw, fold_qk_norm_gain.apply(lifted), [inputs]).passed


def plain(_, x):
    return x


REFUSED = {
    "a bias": (Heads(plain, nn.LayerNorm(HEAD)), "q_norm", "it adds a bias"),
    "the keys have no norm": (Heads(plain, None, nn.Identity()), "q_norm", "no norm of the keys"),
    "the keys' gain is fixed": (Heads(plain, None, nn.RMSNorm(HEAD, elementwise_affine=False)), "q_norm", "no gain"),
    "the key's stays": (Heads(plain), "k_norm", "this is the one that stays"),
    "something between": (Heads(lambda m, x: x + x.flip(-1)), "q_norm", None),
    "features in another order": (Heads(lambda m, x: x.flip(-1)), "q_norm", "another order"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refuses_in_words(case):
    model, where, reason = REFUSED[case]
    raw, lifted, inputs = graphs(model)
    sites = {site.where: site for site in fold_qk_norm_gain.find(lifted)}
    if reason is None:
        assert where not in sites
        return
    assert reason in sites[where].refused
    assert prove(raw, fold_qk_norm_gain.apply(lifted), [inputs]).passed


def test_a_shared_gain_is_refused():
    norm = nn.RMSNorm(HEAD, eps=1e-6)
    _, lifted, _ = graphs(Heads(plain, norm, norm))
    assert "is also read by" in fold_qk_norm_gain.find(lifted)[0].refused


def test_one_plus_w():
    class OnePlus(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(HEAD))

        def forward(self, x):
            return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) * (1.0 + self.weight)

    raw, lifted, inputs = graphs(Heads(plain, OnePlus(), OnePlus()))
    folded = fold_qk_norm_gain.apply(lifted, form=STOCK)
    assert torch.equal(folded.evaluate("q_norm.weight"), torch.zeros(HEAD, dtype=torch.float64))
    evidence = prove(raw, folded, [inputs])
    assert evidence.passed, evidence


def test_in_bfloat16_it_is_at_most_twice_as_far_from_the_truth():
    model = scales.architectures.build("qwen3", torch.bfloat16)
    inputs = scales.architectures.inputs(model)
    raw = trace(model, inputs)
    evidence = prove(raw, fold_qk_norm_gain.apply(lift(raw)), [inputs])
    assert evidence.passed, evidence


def test_nothing_depends_on_the_sizes_of_the_trace():
    raw = trace(Heads(lambda m, x: x * 2).eval(), {"x": torch.ones(2, 6, HEAD)}, symbolic=True)
    lifted = lift(raw)
    folded = fold_qk_norm_gain.apply(lifted)
    x = torch.randn(3, 11, HEAD)
    before, after = (graph.run({"x": x}, float64=True) for graph in (lifted, folded))
    for name, value in before.items():
        assert (after[name] - value).abs().max() <= 1e-12 * value.abs().max()
