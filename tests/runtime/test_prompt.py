"""Prompts: many rows at once compute what the words mean, as well as plain torch in the same dtype does."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from test_runner import FORMATS, VOCABULARY, of, program, weight
from torch import Tensor

from taut.runtime.plain import PlainRunner, empty_caches
from taut.runtime.prompt import PromptRunner
from taut.runtime.steps import Attend, Embed, Glu, Linear, Norm, Program, Rotary, Torch, View

LENGTH = 300
EPS = torch.finfo(torch.float32).eps


def attention(**changes) -> Program:
    """Turned, normed and grouped heads between two layers."""
    heads, kv_heads, d, dv = 6, 2, 16, 24
    q, k, v = heads * d, kv_heads * d, kv_heads * dv
    widths = {"x": 32, "qkv": q + k + v, "a": heads * dv, "y": 32, "g": 40}
    views = View("qkv", 0, q), View("qkv", q, q + k), View("qkv", q + k, q + k + v)
    angles = torch.rand(LENGTH, d // 4) * 6
    step = Attend("a", *views, 0, heads, kv_heads, d, dv, d**-0.5, Rotary(angles.cos(), angles.sin()))
    steps = [
        Linear("qkv", of("x", widths), weight(q + k + v, 32), torch.randn(q + k + v), Norm(1e-5, torch.rand(32))),
        dataclasses.replace(step, **changes),
        Linear("y", of("a", widths), weight(32, heads * dv), residual=of("x", widths)),
        Glu("g", of("y", widths), weight(40, 32), weight(40, 32), "gelu", None, None, Norm(1e-5, centred=True)),
    ]
    return program(steps, widths, ((kv_heads, d, dv),), LENGTH)


def error(y: Tensor, true: Tensor) -> float:
    return float((y.double() - true).norm() / true.norm())


def check(made: Program, pieces: tuple[int, ...] = (200, 90), cache: torch.dtype = torch.float32, lost: float = 0):
    """A prompt in pieces, in the second of three slots: at most twice the error that plain float32 makes."""
    truth, plain = (PlainRunner(made, 3, dtype=dtype) for dtype in (torch.float64, torch.float32))
    fast = PromptRunner(made, empty_caches(made, 3, cache))
    for caches in fast.caches:
        for t in caches:
            t.fill_(float("nan"))
    start = 0
    for count in pieces:
        tokens, slots = torch.randint(VOCABULARY, (count,)), torch.ones(count, dtype=torch.long)
        inputs = tokens, torch.arange(start, start + count), slots
        true, limit = truth.run(*inputs), 2 * error(plain.run(*inputs), truth.run(*inputs)) + EPS + lost
        assert error(fast.run(*inputs), true) <= limit
        last = torch.tensor([count - 1])
        assert error(fast.run(*inputs, last), true[-1:]) <= 4 * limit  # one row alone scatters more
        start += count


@pytest.mark.parametrize("rows", [1, 3, 5, 40])
@pytest.mark.parametrize("form", [form for form in FORMATS if form != "bfloat16"])
def test_every_weight_format(form: str, rows: int):
    torch.manual_seed(rows)
    k = 96 if form.startswith("int4") else 77
    widths = {"x": k, "h": 75, "g": 90, "y": 64}
    x = of("x", widths)
    steps = [
        Linear("h", x, weight(75, k, form), torch.randn(75), activation="gelu_tanh"),
        Glu("g", x, weight(90, k, form), weight(90, k, form), "silu", torch.randn(90), torch.randn(90)),
        Linear("y", View("g", 7, 71), weight(64, 64), torch.randn(64), residual=View("h", 11, 75)),
    ]
    made = program(steps, widths)
    check(dataclasses.replace(made, steps=(Embed("x", weight(VOCABULARY, k, form), 3.0), *made.steps[1:])), (rows,))


@pytest.mark.parametrize("rows", [1, 3, 5, 40])
def test_bfloat16_weights_are_as_good_as_the_same_code_in_bfloat16(rows: int):
    torch.manual_seed(rows)
    widths = {"x": 77, "g": 90, "y": 77}
    x = of("x", widths)
    gate, up, down = (weight(*size, "bfloat16") for size in ((90, 77), (90, 77), (77, 90)))
    made = program([Glu("g", x, gate, up, "silu"), Linear("y", of("g", widths), down, residual=x)], widths)
    tokens, head = torch.randint(VOCABULARY, (rows,)), made.steps[-1]
    places = tokens, torch.arange(rows), torch.zeros(rows, dtype=torch.long)
    true = PlainRunner(made, 1, dtype=torch.float64).run(*places)
    h = made.steps[0].table.data[tokens].bfloat16()  # type: ignore[union-attr]
    h = h + torch.nn.functional.silu(h @ gate.data.T) * (h @ up.data.T) @ down.data.T
    own = h @ head.weight.data.bfloat16().T  # type: ignore[union-attr]
    assert error(PromptRunner(made, []).run(*places), true) <= 2 * error(own, true)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"rotary": None, "softcap": 1.5},
        {"q_norm": Norm(1e-5, torch.rand(16)), "k_norm": Norm(1e-5, torch.rand(16), torch.randn(16))},
        {"first": (torch.arange(LENGTH) - 20).clamp_min(0)},
        {"first": (torch.arange(LENGTH) // 30) * 30, "sinks": torch.randn(6) * 3},
        {"alibi": torch.rand(6), "rotary": None},
        {"sinks": torch.full((6,), 30.0)},
    ],
)
def test_attention(changes: dict):
    torch.manual_seed(0)
    check(attention(**changes))
    check(attention(**changes), (1, 130, 3, 60))


def test_interleaved_rotation():
    torch.manual_seed(0)
    angles = torch.rand(LENGTH, 5) * 6
    check(attention(rotary=Rotary(angles.cos(), angles.sin(), interleaved=True)))


@pytest.mark.parametrize("cache", [torch.bfloat16, torch.float16])
def test_a_narrow_cache_loses_only_its_rounding(cache: torch.dtype):
    torch.manual_seed(0)
    check(attention(), cache=cache, lost=torch.finfo(cache).eps)


def test_rows_of_several_slots_do_not_see_each_other():
    torch.manual_seed(0)
    made = attention()
    tokens = torch.randint(VOCABULARY, (90,))
    slots = torch.tensor([2] * 30 + [0] * 50 + [1] * 10)
    positions = torch.cat([torch.arange(n) for n in (30, 50, 10)])
    together = PromptRunner(made, empty_caches(made, 3, torch.float32)).run(tokens, positions, slots)
    for slot in range(3):
        mine = slots == slot
        alone = PlainRunner(made, 3, dtype=torch.float64).run(tokens[mine], positions[mine], slots[mine])
        assert error(together[mine], alone) <= 32 * EPS


def test_nothing_is_computed_of_rows_that_nobody_asks_for():
    """Behind the last attention only the rows named are left."""
    seen: list[int] = []

    def look(rows: Tensor) -> tuple[Tensor, ...]:
        seen.append(len(rows))
        return (rows,)

    made = attention()
    copy = Torch(("z",), (View("g", 0, 40),), look, "")
    head = dataclasses.replace(made.steps[-1], x=View("z", 0, 40))
    made = dataclasses.replace(made, steps=(*made.steps[:-1], copy, head), widths=made.widths | {"z": 40})
    places = torch.arange(9), torch.arange(9), torch.zeros(9, dtype=torch.long)
    PromptRunner(made, empty_caches(made, 1, torch.float32)).run(*places, torch.tensor([8]))
    assert seen == [1]
