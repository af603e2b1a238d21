"""Runs in a process of its own with Triton's interpreter switched on: programs through the kernels of a GPU.

Prints a line `name error plain_error` a case, against the same program run by torch in float64 and in the dtype of its
weights. No bfloat16: the interpreter multiplies none.
"""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parent))

from test_runner import LENGTH, VOCABULARY, attending, of, program, rows_of, weight

from taut.ops._triton.launch import Config
from taut.runtime.cuda import CudaRunner
from taut.runtime.plain import PlainRunner
from taut.runtime.sampling import Sampling
from taut.runtime.steps import Combine, Embed, Glu, Linear, Norm, Normalize, Program, Torch, View


def report(name: str, made: Program, rows: int, at: int = 0, runs: int = 2) -> None:
    """Over some tokens, from a random past; memory is NaN before."""
    torch.manual_seed(0)
    ours = CudaRunner(made, rows, device="cpu", capture=False)
    ours.kernels.arena.fill_(float("nan"))
    ours.kernels.logits.fill_(float("nan"))
    ours.kernels.scratch.fill_(float("nan"))
    plain = [PlainRunner(made, rows, dtype=dtype) for dtype in (torch.float64, torch.float32)]
    past = [[torch.randn(*t.shape) for t in pair] for pair in ours.caches]
    for runner in (*plain, ours):
        for pair, old in zip(runner.caches, past, strict=True):
            for t, values in zip(pair, old, strict=True):
                t.copy_(values.to(ours.dtype))
    for i in range(runs):
        given = rows_of(rows, at + i)
        truth, by_torch, found = (runner.run(*given) for runner in (*plain, ours))
        error = lambda y, truth=truth: float((y.double() - truth).norm() / truth.norm())  # noqa: E731
        own = torch.finfo(ours.dtype).eps
        print(name, error(found), max(error(by_torch), own), flush=True)


def dense() -> None:
    torch.manual_seed(1)
    widths = {"x": 77, "y": 37, "z": 37, "g": 21}
    x, norm = of("x", widths), Norm(1e-5, torch.rand(77), torch.randn(77), centred=True)
    for form in ("float32", "float16"):
        for rows in (1, 3):
            first = Linear("y", x, weight(37, 77, form), torch.randn(37), norm, "gelu", 0.7)
            second = Linear("z", x, weight(37, 77, form), None, Norm(1e-3), None, 1.3, 2.0, of("y", widths))
            act = "gelu_tanh" if rows == 1 else "silu"
            third = Glu("g", of("z", widths), weight(21, 37, form), weight(21, 37, form), act,
                        torch.randn(21), torch.randn(21), Norm(1e-6, torch.rand(37)))  # fmt: skip
            made = program([first, second, third], widths)
            halves = [dataclasses.replace(s, weight=weight(*s.weight.data.shape, form)) for s in made.steps[-1:]]  # type: ignore
            report(f"dense_{form}_{rows}", dataclasses.replace(made, steps=(*made.steps[:-1], *halves)), rows)


def padded() -> None:
    """A row that is held at once, in one tile."""
    import taut.runtime._triton.kernels as kernels

    torch.manual_seed(1)
    own = kernels.ONE_ROW
    kernels.ONE_ROW = {(37, 77, gated): Config(2, 0, 1024) for gated in (False, True)}
    widths = {"x": 77, "y": 37, "g": 21}
    first = Linear("y", of("x", widths), weight(37, 77), None, Norm(1e-5, centred=True))
    second = Glu("g", of("y", widths), weight(21, 37), weight(21, 37), "silu", None, None, Norm(1e-6, torch.rand(37)))
    report("padded", program([first, second], widths), 1)
    kernels.ONE_ROW = own


def long() -> None:
    """More inputs than a tile holds, and a product that is split."""
    torch.manual_seed(2)
    widths = {"x": 2600, "y": 40, "g": 24}
    x = of("x", widths)
    for rows in (1, 2):
        steps = [Linear("y", x, weight(40, 2600), None, Norm(1e-5, torch.rand(2600) if rows == 1 else None))]
        steps += [Glu("g", x, weight(24, 2600), weight(24, 2600), "silu", None, None, Norm(1e-5, centred=rows == 1))]
        report(
            f"long_{rows}", program([*steps, Combine("c", View("y", 0, 24), of("g", widths))], widths | {"c": 24}), rows
        )


def places() -> None:
    torch.manual_seed(3)
    widths = {"x": 45, "p": 20, "a": 45, "b": 10, "c": 10, "d": 10, "n": 45, "m": 45}
    steps = [
        Torch(("a", "b"), (of("x", widths),), lambda x: (x.flip(-1), x[:, :10] * 2), "no word for flip"),
        Combine("c", View("a", 3, 13), of("b", widths), product=True),
        Combine("d", of("c", widths), None, 3.0),
        Normalize("n", of("a", widths), Norm(1e-2, torch.rand(45), torch.randn(45), True)),
        Normalize("m", of("n", widths), Norm(1e-2), residual=of("x", widths)),
    ]
    made = program([*steps, Combine("p", View("m", 0, 20), View("x", 0, 20), 0.5, 2.0)], widths)
    embed = Embed("x", weight(VOCABULARY, 45), 2.0, weight(LENGTH + 2, 45), 2)
    for rows in (1, 3):
        report(f"places_{rows}", dataclasses.replace(made, steps=(embed, *made.steps[1:])), rows)


def attention() -> None:
    torch.manual_seed(4)
    norms = {"q_norm": Norm(1e-5, torch.rand(16)), "k_norm": Norm(1e-5, torch.rand(16), torch.rand(16), True)}
    options = {
        "plain": {},
        "interleaved": {"interleaved": True},
        "softcap": {"softcap": 2.0},
        "first": {"first": (torch.arange(LENGTH) - 40).clamp_min(0)},
        "alibi": {"alibi": torch.rand(6)},
        "sinks": {"sinks": torch.randn(6)},
        "norms": norms,
    }
    for name, given in options.items():
        report(f"attend_{name}", attending(6, 2, 16, 16, 16, **given), 2, at=100)
        report(f"near_{name}", attending(6, 2, 16, 16, 16, **given), 1, at=100)
    report("near_partial", attending(5, 1, 24, 8, 8), 1)
    report("attend_partial", attending(5, 1, 24, 17, 8), 3)
    report("attend_no_turn", attending(3, 3, 7, 5, 0), 1, at=64)


def stretches() -> None:
    """Several stretches of keys, which the last program joins, or the product behind them."""
    import taut.runtime._triton.kernels as kernels
    from taut.runtime._triton.launch import Reach

    torch.manual_seed(5)
    own = kernels.NEAR, kernels.FAR
    kernels.NEAR, kernels.FAR = Reach(16, 4), Reach(16, 16, 16)
    sliding = {"first": (torch.arange(LENGTH) - 70).clamp_min(0)}
    report("stretches", attending(6, 2, 16, 16, 16, sinks=torch.randn(6)), 1, at=130)
    report("stretches_rows", attending(6, 2, 16, 16, 16, **sliding), 2, at=90)
    report("stretches_too_far_to_be_left", attending(6, 2, 16, 16, 16), 1, at=64)
    kernels.NEAR = Reach(16, 9)
    report("stretches_left", attending(6, 2, 16, 16, 16), 1, at=130)
    report("stretches_left_full", attending(6, 2, 16, 16, 16), 1, at=143)
    report("stretches_left_sliding", attending(6, 2, 16, 16, 16, **sliding), 1, at=90)
    kernels.NEAR, kernels.FAR = own


def draws() -> None:
    """Tokens drawn on the device are those drawn from the logits by the op on a CPU, and the rows move on."""
    torch.manual_seed(6)
    made = attending(6, 2, 16, 16, 16)
    for how in (Sampling(), Sampling(0.8, seed=2**40 + 3), Sampling(0.7, 20, 0.9, 0.01, 5)):
        runner, other = (CudaRunner(made, 3, device="cpu", capture=False) for _ in range(2))
        tokens, positions, slots = torch.tensor([4, 5, 6]), torch.tensor([0, 0, 0]), torch.tensor([2, 0, 1])
        for _ in range(4):
            expected = how.draw(other.run(tokens, positions, slots), slots, positions)
            assert runner.draw(tokens, positions, slots, how) == expected, how
            tokens, positions = torch.tensor(expected), positions + 1
            assert torch.equal(runner.rows[:2], torch.stack((tokens, positions)))
    print("draws 0 1")


if __name__ == "__main__":
    for part in (dense, padded, long, places, attention, stretches, draws):
        part()
