"""Which configuration of a measured table serves a product."""

from __future__ import annotations

import functools
import json

import pytest
import torch

pytest.importorskip("triton")

from taut.ops._triton import choice, tune


def test_a_product_takes_the_nearest_row_that_was_measured(monkeypatch):
    row = {"kind": "glu", "k": 64, "n": 32, "tokens": 1, "config": [4, 0, 64], "us": 2.0, "product_us": 3.0}
    rows = [row | {"summed": [8, 0, 64]}, row | {"n": 320, "config": None}, row | {"tokens": 16, "us": 4.0}]
    monkeypatch.setattr(choice, "table", lambda device: json.loads(tune.written(device, rows))["measured"])
    chosen = functools.partial(choice.choose, "glu", k=64, device="any")
    assert chosen(1, 40) == choice.Config(4, 0, 64)
    assert chosen(1, 40, summed=True) == choice.Config(8, 0, 64)
    assert chosen(9, 40, summed=True) == choice.Config(4, 0, 64)
    assert "vendor's product is faster" in chosen(1, 300)
    assert "vendor's product is faster" in chosen(16, 32, alone=True)
    assert "no glu of 64 tokens" in chosen(17, 32)


@pytest.mark.gpu
def test_configurations_for_a_sum_are_right_and_repeat_themselves():
    torch.manual_seed(0)
    rows = [row for row in choice.table("NVIDIA H200") if row["tokens"] == 1 and row["config"]]
    assert len(rows) > 10
    for row in rows:
        config = choice.Config(*row.get("summed", row["config"]))
        x, (weight,), (up,) = tune.inputs(tune.Shape(row["k"], row["n"], row["kind"]), 1, 1)
        wide = [None if t is None else t.double() for t in (x + x, weight, up)]
        truth, plain = tune.vendor(*wide), tune.vendor(x + x, weight, up)
        y = tune.of_sum(x, weight, up, config)
        assert (y.double() - truth).norm() <= 2 * (plain.double() - truth).norm(), row
        assert all(torch.equal(y, tune.of_sum(x, weight, up, config)) for _ in range(100)), row
