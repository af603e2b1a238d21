import pytest
import torch
import torch.nn.functional as F

from taut.lift import lift
from taut.nn.ffn.bit_linear import token_codes
from taut.nn.mixer.mlgru import MLGRU, Gain, MatMulFreeBlock, forget_floors, linear_recurrence, linear_scan
from taut.nn.norm.rms_norm import RMSNorm
from taut.proof import prove
from taut.rewrites.cancel_norm import cancel_norm
from taut.tracing import trace

from .char_lm import CONTEXT, corpus


@pytest.mark.parametrize("length", [1, 2, 37, 256])
@pytest.mark.parametrize("with_state", [False, True])
def test_scan_is_the_recurrence(length, with_state):
    torch.manual_seed(0)
    forget, inputs = torch.rand(3, length, 8).double(), torch.randn(3, length, 8).double()
    state = torch.randn(3, 8).double() if with_state else None
    want = linear_recurrence(forget, inputs, state)
    torch.testing.assert_close(linear_scan(forget, inputs, state), want, rtol=1e-10, atol=1e-10)


def test_scan_has_the_recurrence_s_gradient():
    torch.manual_seed(0)
    values = [torch.rand(2, 13, 4).double().requires_grad_() for _ in range(2)]
    upstream = torch.randn(2, 13, 4).double()
    got = torch.autograd.grad(linear_scan(*values), values, upstream)
    want = torch.autograd.grad(linear_recurrence(*values), values, upstream)
    torch.testing.assert_close(got, want, rtol=1e-10, atol=1e-10)


def test_decoding_token_by_token_is_the_whole_at_once():
    torch.manual_seed(0)
    layer, x = MLGRU(32).double(), torch.randn(2, 9, 32).double()
    whole, last = layer(x)
    state, steps = None, []
    for t in range(9):
        y, state = layer(x[:, t : t + 1], state)
        steps.append(y)
    torch.testing.assert_close(torch.cat(steps, 1), whole, rtol=1e-10, atol=1e-10)
    torch.testing.assert_close(state, last, rtol=1e-10, atol=1e-10)


def test_floors_rise_from_zero_and_hold_the_gates_up():
    torch.manual_seed(0)
    floors = forget_floors(torch.randn(5, 32))
    assert not floors[0].any()
    assert (floors.diff(dim=0) > 0).all()
    assert (floors < 1).all()
    layer, x = MLGRU(32), torch.randn(2, 9, 32)
    assert (layer.gates(x, floors[4])[0] >= floors[4]).all()


@pytest.mark.parametrize("mean_square", [1e-2, 1.0, 1e3])
def test_the_outer_division_is_redundant(mean_square):
    torch.manual_seed(0)
    x, outer, inner = torch.randn(2000, 256) * mean_square**0.5, RMSNorm(256, 1e-6), RMSNorm(256, 1e-8)
    x = x * (mean_square / x.pow(2).mean(-1, keepdim=True)).sqrt()
    gain = Gain(256)
    with torch.no_grad():
        outer.weight.uniform_(0.5, 2.0)
    gain.load_state_dict(outer.state_dict())
    twice, once = inner(outer(x)), inner(gain(x))
    assert (once - twice).norm() <= 1e-6 * twice.norm()
    flips = (token_codes(once)[0] != token_codes(twice)[0]).float().mean()
    assert flips < 1e-4


def test_a_block_without_outer_norms_loads_the_same_weights():
    torch.manual_seed(0)
    x = torch.randn(2, 9, 32).double()
    block, lean = MatMulFreeBlock(32).double(), MatMulFreeBlock(32, outer_norm=False).double()
    lean.load_state_dict(block.state_dict())
    torch.testing.assert_close(lean(x)[0], block(x)[0], rtol=1e-4, atol=1e-4)


def test_as_a_rewrite_it_leaves_the_outer_norms_out_of_a_block():
    class Block(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.block = MatMulFreeBlock(32)

        def forward(self, x):
            return self.block(x)[0]

    torch.manual_seed(0)
    inputs = {"x": torch.randn(2, 7, 32)}
    raw = trace(Block().eval(), inputs)
    sites = cancel_norm.find(lift(raw))
    taken = {site.where.removeprefix("block.") for site in sites if site.refused is None}
    assert taken == {"attn_norm", "attn.g_norm", "mlp_norm"}
    evidence = prove(raw, cancel_norm.apply(lift(raw)), [inputs])
    assert evidence.passed, evidence


@pytest.mark.slow
def test_a_tiny_language_model_trains():
    torch.manual_seed(0)
    data = corpus()[0]
    embed, head = torch.nn.Embedding(128, 64), torch.nn.Linear(64, 128)
    blocks = torch.nn.ModuleList(MatMulFreeBlock(64) for _ in range(2))
    optimizer = torch.optim.AdamW([*embed.parameters(), *blocks.parameters(), *head.parameters()], lr=4e-3)
    losses = []
    for _ in range(200):
        starts = torch.randint(len(data) - CONTEXT - 1, (16,))
        rows = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        h = embed(rows[:, :-1])
        for block in blocks:
            h = block(h)[0]
        loss = F.cross_entropy(head(h).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    unigram = -(p := torch.bincount(data, minlength=128) / len(data)).xlogy(p).sum().item()
    assert sum(losses[-20:]) / 20 < unigram - 0.4
