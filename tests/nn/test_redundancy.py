import pytest
import torch
from torch import nn

from taut.demonstrate import DEMO
from taut.redundancy import EffectiveDims, effective_dims, ids_of, moment_rank, redundancy, second_moment


def rank(x, bias=False):
    return moment_rank(second_moment(x, bias=bias), x.dtype)


@pytest.mark.parametrize("d", [8, 64, 512])
def test_ranks_behind_each_normalisation(d):
    torch.manual_seed(0)
    x = torch.randn(4 * d, d)
    for dtype in (torch.float32, torch.float64):
        y = x.to(dtype)
        assert rank(nn.functional.layer_norm(y, (d,))) == d - 1
        assert rank(nn.functional.rms_norm(y, (d,))) == d
        assert rank(y.softmax(-1)) == d
        assert rank(nn.functional.layer_norm(y, (d,)), bias=True) == d
        assert rank(nn.functional.rms_norm(y, (d,)), bias=True) == d + 1
        assert rank(y.softmax(-1), bias=True) == d


@pytest.mark.parametrize("outputs", [1, 7, 48])
def test_layer_norm_costs_the_next_layer_half_its_outputs(outputs):
    torch.manual_seed(0)
    gain = nn.LayerNorm(16, bias=False)
    nn.init.uniform_(gain.weight, 0.5, 2)
    data = [torch.randn(200, 16)]
    for norm, drop in ((gain, outputs / 2), (nn.RMSNorm(16), 0)):
        (layer,) = effective_dims(nn.Sequential(norm, nn.Linear(16, outputs, bias=False)), data)
        assert layer.learning_coefficient_drop == drop


def test_any_curved_data_restores_the_rank_and_more_of_it_restores_more():
    torch.manual_seed(0)
    x = torch.randn(20_000, 16).double()
    smallest = []
    for share in (0.0, 0.001, 0.01, 0.1, 0.5):
        flat = nn.functional.layer_norm(x, (16,))
        curved = torch.arange(20_000) < share * 20_000
        mixed = torch.where(curved[:, None], nn.functional.rms_norm(x, (16,)), flat)
        smallest.append(torch.linalg.eigvalsh(second_moment(mixed))[0].item())
        assert rank(mixed) == (16 if share else 15)
    assert smallest == sorted(smallest)
    assert smallest[1] > 1e6 * abs(smallest[0])


def test_gpt2_s_redundancy_is_what_compressing_its_stream_deletes():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    config = GPT2Config(n_embd=48, n_layer=2, n_head=4, vocab_size=96, n_positions=64)
    config.tie_word_embeddings = False
    model = GPT2LMHeadModel(config).eval()
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    layers = {e.name: e for e in effective_dims(model, [torch.randint(96, (32, 64))])}
    readers = [name for name in layers if name.endswith(("c_attn", "c_fc"))]
    assert len(readers) == 4
    for name in readers:
        assert layers[name].redundant_parameters == layers[name].outputs
    deleted = sum(layers[name].outputs for name in readers)
    assert deleted == 2 * (3 * 48 + 4 * 48)
    assert sum(layers[name].learning_coefficient_drop for name in readers) == deleted / 2
    assert layers["transformer.h.0.mlp.c_proj"].redundant_parameters == 0


def test_a_trained_llama_has_no_redundant_parameter_behind_its_norms(weights):
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(weights / "stories260k").eval()
    layers = effective_dims(model, [torch.randint(3, 512, (8, 200))])
    readers = [e for e in layers if e.name.endswith(("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj", "lm_head"))]
    assert len(readers) == 5 * 5 + 1
    assert all(e.redundant_parameters == 0 for e in readers)


def test_made_up_inputs_show_what_layer_norm_leaves_idle():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=96, n_positions=128)).eval()
    found = {layer.name: layer for layer in redundancy(model)}
    assert found["transformer.h.0.attn.c_attn"].redundant_parameters == 3 * 48
    assert found["transformer.h.0.mlp.c_proj"].redundant_parameters == 0
    assert found == {layer.name: layer for layer in redundancy(model, list(torch.randint(96, (16, 1, 128))))}


def test_a_model_of_few_positions_is_run_as_often_as_its_widest_layer_needs():
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(n_embd=48, n_layer=1, n_head=4, vocab_size=96, n_positions=5)).eval()
    found = {layer.name: layer for layer in redundancy(model)}
    assert found["transformer.h.0.mlp.c_fc"].redundant_parameters == 192
    assert found["transformer.h.0.mlp.c_proj"].inputs == 193


def test_a_router_that_returns_more_than_its_product_is_a_layer():
    import architectures

    found = {layer.name: layer for layer in redundancy(architectures.build("mixtral"))}
    router = found["model.layers.0.mlp.gate"]
    assert (router.inputs, router.rank, router.redundant_parameters) == (48, 48, 0)
    assert router.outputs == architectures.build("mixtral").config.num_local_experts


def test_text_is_cut_into_rows_of_one_length():
    rows = ids_of(DEMO / "model", DEMO / "heldout.txt", 64)
    assert len(rows) > 10
    assert {row.shape for row in rows} == {(1, 64)}


def test_units_of_the_inputs_do_not_matter():
    torch.manual_seed(0)
    x = nn.functional.layer_norm(torch.randn(400, 16), (16,)).double() * torch.logspace(-8, 8, 16).double()
    assert rank(x.float()) == 15


def test_refuses_to_call_a_small_sample_s_rank_the_layer_s():
    with pytest.raises(ValueError, match="give more data"):
        effective_dims(nn.Sequential(nn.Linear(16, 4)), [torch.randn(10, 16)])


def test_counts():
    layer = EffectiveDims("x", inputs=17, outputs=10, rank=15)
    assert (layer.redundant_parameters, layer.learning_coefficient_drop) == (20, 10.0)


@pytest.mark.parametrize(
    ("norm", "theory"), [(nn.functional.layer_norm, 4 * 7 / 2), (nn.functional.rms_norm, 4 * 8 / 2)]
)
def test_langevin_sampling_finds_the_same_learning_coefficient(norm, theory):
    """n beta (E[loss] - loss*) over the tempered posterior around the optimum, by unadjusted Langevin steps."""
    torch.manual_seed(0)
    x = norm(torch.randn(4000, 8).double(), (8,))
    chains, n_beta, step = torch.zeros(64, 4, 8).double(), 4000.0 / 8.3, 1e-4
    moment = x.T @ x / len(x)
    trace = []
    for i in range(3000):
        gradient = n_beta * chains @ moment + chains
        chains = chains - step / 2 * gradient + step**0.5 * torch.randn_like(chains)
        if i >= 1000:
            trace.append(n_beta / 2 * ((chains @ moment) * chains).sum((1, 2)).mean().item())
    assert sum(trace) / len(trace) == pytest.approx(theory, rel=0.1)
