"""The page of the GPU kernels says what the records say."""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "benchmarks"))

import kernels_table


def test_the_page_is_up_to_date():
    page = kernels_table.PAGE.read_text()
    assert kernels_table.written(page) == page, "run benchmarks/kernels_table.py"


def test_the_record_of_the_chains_agrees_with_itself():
    """Its summary and its ratios follow from its times."""
    record = kernels_table.record("chains")
    for row in record["rows"]:
        us = row["us"]
        with_norm, without = (min(us[f"{way} {name}"] for way in ("eager", "compiled")) for name in ("with", "without"))
        assert abs(row["gain"] - with_norm / us["taut"]) < 1e-3
        assert abs(row["over_without_norm"] - us["taut"] / without) < 1e-3
        assert row["error"] <= 2 * row["plain_error"]
    assert abs(record["gain"] - kernels_table.mean([row["gain"] for row in record["rows"]])) < 1e-3
