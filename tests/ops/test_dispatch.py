"""The measured dispatch table of products: thresholds, the nearest shape, and what the ops take from it."""

import math

import pytest
import torch
from twice import as_accurate

from taut.machine import cache_file
from taut.ops import _dispatch
from taut.ops._dispatch import FEW_TOKENS, HAS_ONEDNN, ROWS, Entry, choose, flat, measure, padded_rows, thresholds
from taut.ops.linear import linear


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """A machine that has not been measured."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    clear = _dispatch.table.cache_clear
    clear()
    yield
    clear()


@pytest.fixture
def made_up(monkeypatch):
    small, large = Entry("float32", 32, 32, 2, 12, {}), Entry("float32", 4096, 4096, 1, 1, {})
    monkeypatch.setattr(_dispatch, "table", lambda threads: (small, large))


LIBRARY = "onednn" if HAS_ONEDNN else "reference"
"""The library's product of more than a few rows in float32."""


def first(*args) -> str:
    """The implementation that a call takes."""
    return next(name for name, verdict in linear.explain(*args) if verdict in ("fits", "always fits"))


@pytest.mark.parametrize(
    ("rows", "taken"), [(1, "numba"), (2, "numba"), (3, "flat"), (8, LIBRARY), (12, "flat"), (13, LIBRARY)]
)
def test_an_op_takes_what_the_table_says(made_up, rows: int, taken: str):
    x, weight, bias = torch.randn(rows, 40), torch.randn(30, 40), torch.randn(30)
    assert first(x, weight) == taken
    assert "measured here" in " ".join(reason for _, reason in linear.explain(x, weight)) or rows == 8
    plain, truth = (torch.nn.functional.linear(*(t.to(d) for t in (x, weight, bias))) for d in (x.dtype, torch.double))
    assert as_accurate(linear(x, weight, bias), plain, truth)


def test_the_nearest_shape_of_the_same_dtype_decides(made_up):
    assert choose(2, 100, 100, torch.float32) == "matvec"
    assert choose(2, 2000, 1000, torch.float32) == "library"
    assert choose(2, 100, 100, torch.bfloat16) is None
    assert first(torch.randn(2, 2000), torch.randn(1000, 2000)) == "reference"


def test_a_machine_that_is_not_measured_keeps_to_the_rule(monkeypatch):
    verdicts = dict(linear.explain(torch.randn(3, 40), torch.randn(30, 40)))
    assert verdicts["numba"] == "fits"
    assert "taut machines --measure" in verdicts["flat"]
    cache_file().parent.mkdir(parents=True)
    cache_file().with_suffix(".products.json").write_text('[{"a": 1}]')
    assert choose(1, 40, 30, torch.float32) is None


def column(flat_until: int, matvec_until: int) -> dict[str, list[float]]:
    """Times by which each product is the fastest up to some rows, and the library's is 100."""
    few = [m for m in ROWS if m <= 16]
    return {
        "matvec": [50.0 if m <= matvec_until else 200.0 for m in few],
        "flat": [80.0 if m <= flat_until else 120.0 for m in ROWS],
        "library": [100.0] * len(ROWS),
    }


@pytest.mark.parametrize(
    ("flat_until", "matvec_until", "expected"), [(12, 3, (3, 12)), (0, 4, (4, 4)), (28, 0, (0, 28)), (0, 0, (0, 0))]
)
def test_thresholds_are_the_points_of_inflection(flat_until, matvec_until, expected):
    assert thresholds(column(flat_until, matvec_until)) == expected


def test_a_product_that_is_faster_by_chance_is_not_taken():
    times = column(0, 0)
    times["flat"] = [99.0] * len(ROWS)
    assert thresholds(times) == (0, 0)


def test_what_is_measured_is_remembered_and_used():
    told: list[str] = []
    (entry,) = measure(told.append, [(64, 48)], [torch.float32], seconds=0.0)
    assert told == ["products with a weight of 64 x 48 in float32"]
    assert _dispatch.table(torch.get_num_threads()) == (entry,)
    assert [len(entry.microseconds[name]) for name in ("matvec", "flat", "library")] == [8, len(ROWS), len(ROWS)]
    assert all(0.1 < t < 1e6 and math.isfinite(t) for column in entry.microseconds.values() for t in column)
    assert (entry.m1, entry.m2) == thresholds(entry.microseconds)
    for rows in (1, 3, 9, 27):
        names = {"matvec": "numba", "flat": "flat", "library": LIBRARY if rows > FEW_TOKENS else "reference"}
        taken = choose(rows, 64, 48, torch.float32)
        assert taken is not None
        assert first(torch.randn(rows, 48), torch.randn(64, 48)) == names[taken]


def test_flat_products_pad_to_eight():
    assert [padded_rows(m) for m in (1, 8, 9, 64)] == [8, 8, 16, 64]
    x, weight = torch.randn(2, 5, 40), torch.randn(30, 40)
    assert as_accurate(flat(x, weight), x @ weight.T, x.double() @ weight.double().T)
