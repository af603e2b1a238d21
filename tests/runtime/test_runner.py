"""The interpreter against the same program run by torch in float64."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor

from taut.checkpoint import BadInput
from taut.huge_pages import collapse_meanwhile
from taut.ops._laid import abreast, laid
from taut.ops._numba.compressed import LOOKS_UP
from taut.ops._weights import quantize
from taut.runtime._numba.place import turn
from taut.runtime.placed import gathered, matrices
from taut.runtime.plain import PlainRunner
from taut.runtime.runner import Runner, bytes_read
from taut.runtime.sampling import Sampling
from taut.runtime.steps import (
    Attend,
    Combine,
    Embed,
    Glu,
    Linear,
    Norm,
    Normalize,
    Program,
    Rotary,
    Step,
    Torch,
    View,
    Weight,
)

LENGTH, VOCABULARY = 150, 70
FORMATS = ("float32", "bfloat16", "float16", "int8", "int4", "int4 float32")


def weight(n: int, k: int, form: str = "float32") -> Weight:
    values = torch.randn(n, k) / k**0.5
    if not form.startswith("int"):
        return Weight(values.to(getattr(torch, form)))
    stored, scale = quantize(values, int(form[3]))
    return Weight(stored, scale.float() if form.endswith("float32") else scale)


def program(steps: list[Step], widths: dict[str, int], caches: tuple = (), length: int = LENGTH) -> Program:
    """An embedding "x", these steps, and a head on the last one's output."""
    k, last = widths["x"], steps[-1]
    name = last.outs[0] if isinstance(last, Torch) else last.out
    head = Linear("logits", View(name, 0, widths[name]), weight(VOCABULARY, widths[name]))
    steps = [Embed("x", weight(VOCABULARY, k)), *steps, head]
    return Program(tuple(steps), widths | {"logits": VOCABULARY}, "logits", caches, length)


def of(name: str, widths: dict[str, int]) -> View:
    return View(name, 0, widths[name])


def rows_of(rows: int, at: int = 0) -> tuple[Tensor, Tensor, Tensor]:
    """Tokens, ragged positions and slots."""
    slots = torch.arange(rows)
    return torch.randint(VOCABULARY, (rows,)), at + slots * 3, slots.flip(0)


def poisoned(steps: Program, rows: int, cache: torch.dtype, threads: int, **options) -> Runner:
    torch.set_num_threads(threads)
    runner = Runner(steps, rows, cache, **options)
    runner.packed.arena.fill_(float("nan"))
    return runner


def agree(steps: Program, rows: int, runs: int = 2, at: int = 0, cache: torch.dtype = torch.float32, **options) -> None:
    """Over some tokens: at most twice the error that float32 torch makes, the same bits by one thread and by two."""
    torch.manual_seed(len(steps.steps) + rows)
    plain = [PlainRunner(steps, rows, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    runners = [*plain, *(poisoned(steps, rows, cache, threads, **options) for threads in (1, 2))]
    past = [[torch.randn(*t.shape).to(cache) for t in pair] for pair in runners[2].caches]
    for runner in runners:
        for pair, old in zip(runner.caches, past, strict=True):
            for t, values in zip(pair, old, strict=True):
                t.copy_(values)
    for i in range(runs):
        tokens, positions, slots = rows_of(rows, at + i)
        truth, by_torch, one, two = (runner.run(tokens, positions, slots) for runner in runners)
        error = lambda y, truth=truth: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
        lost = torch.finfo(cache).eps if cache != torch.float32 else 0
        assert error(one) <= 2 * error(by_torch) + torch.finfo(torch.float32).eps + lost
        assert torch.equal(one, two)


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("form", FORMATS)
def test_every_weight_format(form: str, rows: int):
    k = 96 if form.startswith("int4") else 77
    widths = {"x": k, "h": 75, "g": 90}
    x = of("x", widths)
    steps = [Linear("h", x, weight(75, k, form)), Glu("g", x, weight(90, k, form), weight(90, k, form), "silu")]
    made = program([*steps, Combine("y", View("g", 5, 80), of("h", widths), 0.5, 2.0)], widths | {"y": 75})
    agree(dataclasses.replace(made, steps=(Embed("x", weight(VOCABULARY, k, form), 3.0), *made.steps[1:])), rows)


@pytest.fixture
def compressing(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no cache held the weights, and widening cost nothing."""
    monkeypatch.setattr("taut.runtime.placed.LARGE", 0)
    monkeypatch.setattr("taut.ops._laid.FEW", dict.fromkeys([torch.float32, torch.bfloat16], (16, 16)))


@pytest.mark.skipif(not LOOKS_UP, reason="COMPRESSED WEIGHTS NOT TESTED: no instruction looks up bytes")
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 16])
@pytest.mark.parametrize("forms", [("float32", "float32"), ("bfloat16", "bfloat16"), ("bfloat16", "float16")])
@pytest.mark.usefixtures("compressing")
def test_compressed_weights(forms: tuple[str, str], rows: int):
    widths = {"x": 77, "h": 1100, "g": 90}
    x, (first, second) = of("x", widths), forms
    steps = [
        Linear("h", x, weight(1100, 77, first)),
        Glu("g", x, weight(90, 77, first), weight(90, 77, second), "silu"),
    ]
    made = program([*steps, Combine("y", View("g", 5, 80), View("h", 9, 84), 0.5, 2.0)], widths | {"y": 75})
    found = [m.data.dtype for m in matrices(gathered(made, rows, 0), False)]
    assert [dtype in (torch.uint16, torch.uint32) for dtype in found[:3]] == [True, True, second != "float16"]
    agree(made, rows)


@pytest.mark.parametrize("activation", [None, "silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "tanh"])
def test_linear(activation: str | None):
    widths = {"x": 33, "y": 37, "z": 37, "g": 21}
    norm = Norm(1e-5, torch.rand(33), torch.randn(33), centred=True)
    x, bias = of("x", widths), torch.randn(37)
    first = Linear("y", x, weight(37, 33), bias, norm, activation, 0.7, residual=None)
    second = Linear("z", x, weight(37, 33), bias, Norm(1e-3, torch.rand(33)), activation, 1.3, 2.0, of("y", widths))
    third = Glu("g", of("z", widths), weight(21, 37), weight(21, 37), activation or "identity", bias[:21], bias[16:],
                Norm(1e-6, centred=True))  # fmt: skip
    agree(program([first, second, third], widths), 3)


@pytest.mark.parametrize("centred", [True, False])
@pytest.mark.parametrize("gain", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_normalize(centred: bool, gain: bool, bias: bool):
    widths = {"x": 45, "y": 45, "z": 45}
    norm = Norm(1e-2, torch.rand(45) if gain else None, torch.randn(45) if bias else None, centred)
    again = Normalize("z", of("y", widths), norm, residual=of("x", widths))
    agree(program([Normalize("y", of("x", widths), norm), again], widths), 2)


def test_combine_embed_and_torch():
    widths = {"x": 20, "p": 20, "a": 20, "b": 10, "c": 10, "d": 10}
    flip = Torch(("a", "b"), (of("x", widths),), lambda x: (x.flip(-1), x[:, :10] * 2), "no word for flip")
    steps = [
        flip,
        Combine("c", View("a", 3, 13), of("b", widths), product=True),
        Combine("d", of("c", widths), None, 3.0),
    ]
    made = program([*steps, Combine("p", of("a", widths), of("x", widths))], widths)
    embed = Embed("x", weight(VOCABULARY, 20), 2.0, weight(LENGTH + 2, 20, "bfloat16"), 2)
    agree(dataclasses.replace(made, steps=(embed, *made.steps[1:])), 3)
    agree(dataclasses.replace(made, steps=(embed, *made.steps[1:])), 3, stepwise=True)


def attending(heads: int, kv_heads: int, d: int, dv: int, rotated: int = 0, **options) -> Program:
    """Two attentions, of which the second reads the first's cache."""
    q, k, v = heads * d, kv_heads * d, kv_heads * dv
    widths = {"x": 40, "qkv": q + k + v, "y": heads * dv, "q": q, "z": heads * dv}
    angles = torch.arange(LENGTH)[:, None] * torch.rand(rotated // 2)
    options["rotary"] = Rotary(angles.cos(), angles.sin(), options.pop("interleaved", False)) if rotated else None
    sizes = {"layer": 0, "heads": heads, "kv_heads": kv_heads, "d": d, "dv": dv, "scale": d**-0.5}
    views = View("qkv", 0, q), View("qkv", q, q + k), View("qkv", q + k, q + k + v)
    steps = [
        Linear("qkv", of("x", widths), weight(q + k + v, 40)),
        Attend("y", *views, **sizes, **options),
        Linear("q", of("y", widths), weight(q, heads * dv)),
        Attend("z", of("q", widths), None, None, **sizes, **options),
    ]
    return program(steps, widths, ((kv_heads, d, dv),))


@pytest.mark.parametrize("rows", [1, 3])
def test_attention_waits_for_the_merge_of_one_before_it(rows: int):
    """Both use the same room for their chunks, and one row goes from turning to attention without a wait."""
    made = attending(6, 2, 16, 16, 16)
    one, other = made.steps[2], made.steps[4]
    assert isinstance(one, Attend)
    assert isinstance(other, Attend)
    made = dataclasses.replace(made, steps=(*made.steps[:3], dataclasses.replace(other, q=one.q), *made.steps[5:]))
    agree(made, rows, at=70)
    steps = Runner(made, rows).packed.steps
    assert [bool(wait) for run, wait in zip(steps["run"], steps["wait"], strict=True) if run == turn()] == [True, True]


@pytest.mark.parametrize("rows", [1, 2, 3, 5])
@pytest.mark.parametrize("sizes", [(6, 2, 16, 16, 16), (5, 1, 24, 17, 8), (4, 4, 64, 80, 0), (3, 3, 7, 5, 6)])
def test_attention(rows: int, sizes: tuple[int, ...]):
    agree(attending(*sizes), rows, at=0)
    agree(attending(*sizes, interleaved=True) if sizes[4] else attending(*sizes), rows, at=70)


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"first": (torch.arange(LENGTH) - 40).clamp_min(0)},
        {"alibi": torch.rand(6)},
        {"sinks": torch.randn(6)},
        {"q_norm": Norm(1e-5, torch.rand(16)), "k_norm": Norm(1e-5, torch.rand(16), torch.rand(16), True)},
    ],
    ids=lambda options: next(iter(options)),
)
def test_attention_options(options: dict):
    agree(attending(6, 2, 16, 16, 16, **options), 3, at=100)


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16])
def test_caches_in_half_precision(cache: torch.dtype):
    agree(attending(6, 2, 16, 24, 8), 3, at=100, cache=cache)


def test_rows_of_one_slot_see_each_other():
    made, tokens = attending(6, 2, 16, 16, 16), torch.randint(VOCABULARY, (5,))
    together, alone = Runner(made, 5), Runner(made)
    found = together.run(tokens, torch.arange(5), torch.zeros(5, dtype=torch.long)).clone()
    for i in range(5):
        expected = alone.run(tokens[i : i + 1], torch.tensor([i]), torch.tensor([0]))
        assert torch.equal(found[i], expected[0])


def test_written_caches_are_read():
    made = attending(6, 2, 16, 16, 16)
    one, other = Runner(made, 2), Runner(made, 3, torch.float32)
    for i in range(4):
        one.run(*(torch.tensor([n]) for n in (i, i, 1)))
    keys, values = (t[1, :, :4] for t in one.caches[0])
    other.write(0, 2, 0, keys, values)
    expected = one.run(*(torch.tensor([n]) for n in (9, 4, 1)))
    assert torch.equal(other.run(*(torch.tensor([n]) for n in (9, 4, 2))), expected)


@pytest.mark.usefixtures("compressing")
def test_weights_are_gathered_once_in_the_order_of_reading(monkeypatch: pytest.MonkeyPatch):
    made = attending(2, 1, 16, 16)
    tied = weight(VOCABULARY, 40)
    logits = dataclasses.replace(made.steps[-1], x=View("x", 0, 40), weight=tied)
    again = dataclasses.replace(logits, weight=Weight(tied.data[:]))
    made = dataclasses.replace(
        made, steps=(dataclasses.replace(made.steps[0], table=tied), *made.steps[1:], logits, again)
    )
    found = gathered(made, 1, 0)
    assert found.steps[0] is made.steps[0]
    copies, places = list(matrices(found, False)), [m.data.data_ptr() for m in matrices(found, False)]
    plans = [laid(m.data, 1) for m in matrices(made, False)]
    originals = [plan.write(torch.empty(plan.nbytes, dtype=torch.uint8)) for plan in plans]
    assert all(torch.equal(a.data, b) for a, b in zip(copies, originals, strict=True))
    assert places[-1] == places[-2]
    assert places[:-1] == sorted(set(places))
    sizes = [-(-m.data.nbytes // 128) * 128 for m in copies[:-1]]
    assert places[-1] - places[0] == sum(sizes[:-1])
    room = 2 * sum(m.data.nbytes for m in list(matrices(made, False))[:-1])
    monkeypatch.setattr("taut.runtime.placed.free_memory", lambda: room)
    assert gathered(made, 1, 0) is not made
    assert gathered(made, 1, 1) is made


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.int8])
@pytest.mark.parametrize(("outputs", "inputs"), [(16, 4), (33, 7), (1, 1), (48, 6)])
def test_rows_abreast(outputs: int, inputs: int, dtype: torch.dtype):
    given = torch.randn(outputs + 1, inputs).mul(9).to(dtype)[1:]
    assert (abreast(given).data_ptr() == given.data_ptr()) == (outputs % 16 == inputs % 4 == 0)
    for source in (given, given.T.contiguous().T):
        found = abreast(source).contiguous().view(dtype).view(-1, 16, 2 if dtype == torch.bfloat16 else 1)
        found = found.view(-(-outputs // 16), -1, 16, found.shape[-1]).transpose(2, 3).flatten(1, 2)
        assert torch.equal(found.mT.flatten(0, 1)[:outputs, :inputs], given)
        assert found.shape[1] % 4 == 0
        assert not found[:, inputs:].any()
        assert not found.mT.flatten(0, 1)[outputs:].any()


@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 6, 7, 16])
@pytest.mark.parametrize("form", ["float32", "bfloat16"])
def test_short_of_memory_weights_stay_as_they_are(form: str, rows: int, monkeypatch: pytest.MonkeyPatch):
    widths = {"x": 77, "h": 75, "g": 90}
    x = of("x", widths)
    steps = [Linear("h", x, weight(75, 77, form)), Glu("g", x, weight(90, 77, form), weight(90, 77, form), "silu")]
    made = program([*steps, Combine("y", View("g", 5, 80), of("h", widths), 0.5, 2.0)], widths | {"y": 75})
    agree(made, rows)
    monkeypatch.setattr("taut.runtime.placed.free_memory", lambda: 0)
    assert gathered(made, 1, 0) is made
    monkeypatch.setattr("taut.runtime.runner.free_memory", lambda: None)
    agree(made, rows)


def test_caches_of_a_half_full_slot_move_onto_large_pages(monkeypatch: pytest.MonkeyPatch):
    moved: list[list[int]] = []
    move = lambda tensors: moved.append([t.data_ptr() for t in tensors]) or collapse_meanwhile(tensors)  # noqa: E731
    monkeypatch.setattr("taut.runtime.runner.LARGE", 1)
    monkeypatch.setattr("taut.runtime.runner.collapse_meanwhile", move)
    runner = Runner(attending(2, 1, 16, 16), 3)
    at = lambda *positions: (torch.tensor([1, 2]), torch.tensor(positions), torch.tensor([0, 2]))  # noqa: E731
    runner.run(*at(3, LENGTH // 2 - 1))
    assert len(moved) == 1
    for _ in range(2):
        runner.run(*at(4, LENGTH // 2))
    assert moved[1:] == [[cache[2].data_ptr() for pair in runner.caches for cache in pair]]
    runner.settle()
    assert not any(thread.is_alive() for thread in runner.settling)


@pytest.mark.parametrize("how", [Sampling(), Sampling(0.8, seed=3)], ids=["likeliest", "drawn"])
def test_a_token_is_drawn_as_the_op_draws_from_the_logits(how):
    runner, tokens, positions, slots = Runner(attending(6, 2, 16, 16), 3), [4, 5, 6], [0, 0, 0], [2, 0, 1]
    expected = how.draw(runner.run(*map(torch.tensor, (tokens, positions, slots))), slots, positions)
    assert runner.draw(tokens, positions, slots, how) == expected
    assert len(set(expected)) > 1


@pytest.mark.usefixtures("compressing")
def test_bytes_a_token():
    made = attending(6, 2, 16, 24)
    weights = 4 * ((96 + 80) * 40 + 96 * 144 + VOCABULARY * 144) + 2 * 4 * 40
    runner = Runner(made, 2, torch.bfloat16)
    assert bytes_read(made.steps, runner.caches, [4, 9]) == weights + 2 * 2 * 2 * (16 + 24) * (5 + 10)
    kept = sum(weight.data.nbytes for weight in matrices(runner.laid, False))
    assert runner.bytes_a_token([4, 9]) == kept + 2 * 4 * 40 + 2 * 2 * 2 * (16 + 24) * (5 + 10)


def test_refusals():
    made = attending(6, 2, 16, 16)
    runner = Runner(made, 2)
    for bad in (([VOCABULARY], [0], [0]), ([-1], [0], [0]), ([0], [LENGTH], [0]), ([0], [0], [2]), ([0] * 3,) * 3):
        with pytest.raises(BadInput):
            runner.run(*(torch.tensor(n) for n in bad))
    with pytest.raises(BadInput, match="GiB are free"):
        Runner(dataclasses.replace(made, caches=((10**9, 100, 100),)), 2)
    with pytest.raises(BadInput, match="int8"):
        Runner(made, 2, torch.int8)
    with pytest.raises(ValueError, match="overwrites"):
        Runner(program([Combine("x", View("x", 0, 8))], {"x": 8}))
