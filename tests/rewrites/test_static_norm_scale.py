"""static_norm_scale: hand-counted sites, the formulas, float16's range, calibration, and every reason to refuse."""

import pytest
import scales
import torch
import torch.nn.functional as F
from scales import hand_made, traced
from torch import nn

from taut.facts.degree import NORMS
from taut.lift import lift
from taut.proof import prove
from taut.rewrite import STOCK
from taut.rewrites.fold_norm import fold_norm
from taut.rewrites.static_norm_scale import calibrate, power_of_two, static_norm_scale
from taut.tracing import trace

W = scales.WIDTH
# By hand, two layers each: norms in all, and those behind attention or a feed-forward layer.
SITES = {"llama": (5, 4), "gpt2": (5, 4), "vit": (5, 4), "qwen2": (5, 4), "gemma2": (9, 0), "gpt_neox": (5, 0)}


@pytest.mark.parametrize("name", scales.some(SITES))
def test_sites_are_those_counted_by_hand_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    sites = static_norm_scale.find(lifted)
    assert (len(sites), sum(site.refused is None for site in sites)) == SITES[name]
    assert static_norm_scale.find(lifted, STOCK) == []
    scaled = static_norm_scale.apply(lifted)
    for site in sites:
        for name in site.writes:
            c = scaled.evaluate(name)
            assert torch.frexp(c).mantissa == 0.5  # a power of two
    evidence = prove(raw, scaled, [inputs])
    assert evidence.passed, evidence


def lengths(graph) -> dict[str, float]:
    read = lambda name, rows: graph.tensors[name]  # noqa: E731
    return {site.where: site.detail[1].length(read) for site in static_norm_scale.find(graph) if not site.refused}


def test_the_formulas():
    """Written out from the paper, with each head of the values repeated for its queries."""
    _, lifted, _ = traced("llama")
    read = lambda name: lifted.tensors[f"model.layers.0.{name}.weight"].double()  # noqa: E731
    value = read("self_attn.v_proj").view(2, 8, 48)
    repeated = torch.cat([value[head // 3] for head in range(6)])  # six heads of queries on two of keys
    attention = (read("self_attn.o_proj") @ repeated + torch.eye(48)) @ torch.diag(read("input_layernorm"))
    gain = torch.diag(read("post_attention_layernorm"))
    up, gate, down = (read(f"mlp.{name}_proj") for name in ("up", "gate", "down"))
    glu = torch.linalg.matrix_norm(down @ (up @ gain)) * torch.linalg.matrix_norm(gate @ gain, 2)
    found = lengths(lifted)
    assert found["model.layers.0.post_attention_layernorm"] == pytest.approx(attention.norm().item(), rel=1e-12)
    assert found["model.layers.1.input_layernorm"] == pytest.approx(glu.item(), rel=1e-12)
    _, lifted, _ = traced("gpt2")
    read = lambda name: lifted.tensors[f"transformer.h.0.{name}.weight"].double()  # noqa: E731
    spectral = [torch.linalg.matrix_norm(read(f"mlp.{name}"), 2).item() for name in ("c_fc", "c_proj")]
    kappa = read("ln_2").abs().mean().item() * spectral[0] * spectral[1]
    found = lengths(lifted)
    assert found["transformer.h.1.ln_1"] == pytest.approx(kappa, rel=1e-12)
    fused = read("attn.c_attn").mT[96:]  # queries, keys and values in one product
    kappa = ((read("attn.c_proj").mT @ fused + torch.eye(48)) * read("ln_1")).norm().item()
    assert found["transformer.h.0.ln_2"] == pytest.approx(kappa, rel=1e-12)


def added(model: nn.Module, inputs) -> list[float]:
    """The greatest length, over tokens, of what each attention and each feed-forward adds to the stream."""
    found = []

    def watch(module, given, output):
        output = output[0] if isinstance(output, tuple) else output
        found.append(output.norm(dim=-1).max().item())

    for name, module in model.named_modules():
        if name.rpartition(".")[2] in ("attn", "self_attn", "mlp"):
            module.register_forward_hook(watch)
    with torch.no_grad():
        model(**inputs)
    return found


def test_how_far_the_scales_are_from_what_a_block_adds():
    """Untrained models. A GLU's is one to ten times too long; a plain layer's, of spectral norms, up to sqrt(d) too
    short, as a normalised token has length sqrt(d); attention's is at least sqrt(d) by its unit matrix alone."""
    import transformers

    sizes = {"hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 4, "num_attention_heads": 4}
    plain = {"n_embd": 256, "n_head": 4, "n_layer": 4, "n_positions": 64, "bos_token_id": 0, "eos_token_id": 0}
    torch.manual_seed(0)
    models = (
        transformers.LlamaForCausalLM(transformers.LlamaConfig(**sizes, vocab_size=99)),
        transformers.GPT2LMHeadModel(transformers.GPT2Config(**plain, vocab_size=99)),
    )
    inputs, ratios = {"input_ids": torch.arange(3, 67).view(2, 32)}, {}
    for model in models:
        graph = lift(trace(model.eval(), inputs))
        scales_found = [site.detail[1] for site in static_norm_scale.find(graph) if not site.refused]
        for scale, true in zip(scales_found, added(model, inputs), strict=True):
            length = scale.length(lambda name, rows, graph=graph: graph.tensors[name])
            ratios.setdefault(scale.kind, []).append(length / true)
    assert {kind: len(found) for kind, found in ratios.items()} == {"attention": 8, "glu": 4, "plain": 4}
    assert all(1 <= ratio <= 10 for ratio in ratios["glu"])
    assert all(1 / 16 <= ratio < 1 for ratio in ratios["plain"])
    assert all(ratio > 1 for ratio in ratios["attention"])


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_the_scale_is_that_of_the_length_but_never_above_one(name):
    _, lifted, _ = traced(name)
    scaled = static_norm_scale.apply(lifted)
    found = lengths(lifted)
    assert any(length > 1 for length in found.values())
    assert any(length < 1 for length in found.values())
    for where, length in found.items():
        assert scaled.evaluate(f"{where}.input_scale") == power_of_two(max(1.0, length))


def test_a_folded_gain_gives_the_same_scale():
    raw, lifted, inputs = traced("llama")
    folded = static_norm_scale.apply(fold_norm.apply(lifted))
    before = static_norm_scale.apply(lifted)
    name = "model.layers.1.input_layernorm.input_scale"
    assert folded.evaluate(name) == before.evaluate(name)
    assert prove(raw, folded, [inputs]).passed


def half_norm(x, eps):
    """RMSNorm with its sum of squares in float16, as a unit without float32 has it."""
    squares = (x.half() * x.half()).sum(-1, keepdim=True, dtype=torch.float16)
    return x.half() * torch.rsqrt(squares.float() / x.shape[-1] + eps).half()


def test_float16_overflows_without_it_and_not_with_it():
    """4096 features of size 300: their squares sum to 3.7e8, and float16 ends at 65504."""
    x = 300 * torch.randn(8, 4096, generator=torch.Generator().manual_seed(0))
    truth = F.rms_norm(x.double(), (4096,), eps=1e-6)
    assert torch.equal(half_norm(x, 1e-6), torch.zeros(8, 4096).half())
    c = power_of_two(x.norm(dim=-1).max().item()).float()
    error = (half_norm(c * x, c * c * 1e-6).double() - truth).norm() / truth.norm()
    assert error <= 2e-3
    exact = F.rms_norm(x, (4096,), eps=1e-6)
    scaled = c * x * torch.rsqrt((c * x).square().mean(-1, keepdim=True) + c * c * 1e-6)
    torch.testing.assert_close(scaled, exact, rtol=1e-6, atol=0)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_calibration_brings_every_input_to_a_length_of_about_one(name):
    raw, lifted, inputs = traced(name)
    scaled = calibrate(lifted, [inputs])
    lengths = []

    def watch(node, value, value_of):
        if node.target in NORMS:
            lengths.append(value_of(node.args[0]).norm(dim=-1).max().item())
        return value

    scaled.run(inputs, float64=True, watch=watch)
    assert len(lengths) == 5
    assert all(2**-0.5 <= length <= 2**0.5 for length in lengths)
    evidence = prove(raw, scaled, [inputs])
    assert evidence.passed, evidence


def test_refuses_in_words():
    layers = {"a": nn.Linear(W, W), "n": nn.RMSNorm(W, eps=1e-6)}
    bodies = [
        (lambda m, x: m.n(m.a(x)), "nothing is added"),
        (lambda m, x: m.n(x + m.a(x)), "neither attention nor a feed-forward layer"),
    ]
    for body, reason in bodies:
        (site,) = static_norm_scale.find(hand_made(body, **layers)[1])
        assert reason in site.refused
    with pytest.raises(ValueError, match="at least one example"):
        calibrate(hand_made(bodies[0][0], **layers)[1], [])


def test_half_a_layer_is_none_to_go_by():
    """A gate and what it gates are halves of one layer, so that no layer is read whole."""

    def body(m, x):
        both = m.both(m.norm(x))
        return m.last(x + m.down(F.silu(both[..., :3]) * both[..., 3:]))

    both, down = nn.Linear(W, 6, bias=False), nn.Linear(3, W, bias=False)
    _, graph, _ = hand_made(body, norm=nn.RMSNorm(W), last=nn.RMSNorm(W), both=both, down=down)
    assert len(sites := static_norm_scale.find(graph)) == 2
    assert all(site.refused for site in sites)
