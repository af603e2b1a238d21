"""defer_softmax: sites, the cost that decides them, and the proof."""

import pytest
import scales
import torch
from scales import traced

from taut.ops.attention import attention
from taut.ops.deferred_attention import deferred_attention
from taut.proof import prove
from taut.rewrite import STOCK, TAUT
from taut.rewrites.defer_softmax import change, defer_softmax, sites

LAYERS = {"llama": 2, "gpt2": 2, "gemma2": 2, "vit": 2}


@pytest.mark.parametrize("name", scales.some(LAYERS))
def test_every_attention_is_a_site_and_the_proof_passes(name):
    raw, lifted, inputs = traced(name)
    found = defer_softmax.find(lifted)
    assert len(found) == len(list(lifted.calls(attention))) == LAYERS[name]
    for site in found:
        _, keys, values = (node.meta["val"] for node in site.detail.args[:3])
        assert (site.refused is None) == (values.shape[3] < keys.shape[2])
    after = lifted.copy()
    change(after, sites(after, TAUT))  # where it would not pay too: these inputs are short
    assert len(list(after.calls(deferred_attention))) == LAYERS[name]
    assert prove(raw, after, [inputs]).passed
    assert defer_softmax.find(lifted, STOCK) == []


def test_the_cost_decides():
    graph = traced("llama")[1].copy()  # its shapes are changed here; others read the same trace
    for node in graph.calls(attention):
        for keys, reason in ((7, None), (6, "6 value features"), (3, "no fewer than 3 keys")):
            for place, shape in ((1, (1, 2, keys, 6)), (2, (1, 2, keys, 6))):
                node.args[place].meta["val"] = torch.empty(shape, device="meta")
            refused = next(site.refused for site in sites(graph, STOCK) if site.detail is node)
            assert refused is None if reason is None else reason in refused


def test_the_division_commutes_and_a_row_that_sees_nothing_is_zero():
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, 4, 9, 8).double() for _ in range(3))
    mask = torch.rand(2, 1, 9, 9) > 0.5
    mask[0, :, 3] = False
    more = {"softcap": 2.0, "sinks": torch.randn(4).double()}
    for arguments in ({}, more):
        got, want = deferred_attention(q, k, v, mask, **arguments), attention(q, k, v, mask, **arguments)
        torch.testing.assert_close(got, want, rtol=0, atol=1e-14)
        assert (got[0, :, 3] == 0).all()
    wanted = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    torch.testing.assert_close(deferred_attention(q, k, v, causal=True), wanted, rtol=0, atol=1e-14)
