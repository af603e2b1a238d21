"""The comparison of norms: its parts on a CPU, and that the page shows what the code and the record say."""

from __future__ import annotations

import itertools
import json
import lzma
import math
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "benchmarks"))

import norms  # noqa: E402
import norms_table  # noqa: E402

TINY = norms.Settings(
    width=32, hidden=32, layers=2, heads=2, vocabulary=64, context=16, batch=4, evaluations=3, held_out_batches=1
)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tokens of which each tells the next."""
    folder = tmp_path_factory.mktemp("tokens")
    for part, count in (("train", 4000), ("heldout", 800)):
        tokens = (np.arange(count) * 7 % 64).astype(np.uint16)
        (folder / f"{part}.xz").write_bytes(lzma.compress(tokens.tobytes()))
    return folder


@pytest.fixture(scope="module")
def record() -> dict:
    return json.loads(norms.RECORD.read_text())


@pytest.mark.parametrize("name", norms.NORMS)
def test_every_variant_learns(name: str, data: Path):
    runner = norms.Runner(name, TINY, data, "cpu")
    curve = runner.train(0, 60, 2e-3, 3)
    assert [step for step, _, _ in curve] == [20, 40, 60]
    assert curve[-1][2] < curve[0][2] < math.log(64)
    assert [seconds for _, seconds, _ in curve] == sorted(seconds for _, seconds, _ in curve)
    again = runner.train(0, 60, 2e-3, 3)
    assert [loss for *_, loss in again] == pytest.approx([loss for *_, loss in curve], rel=1e-3)


def test_a_seed_gives_all_variants_the_same_matrices():
    first = norms.fresh("LayerNorm", TINY, 3)
    for name in norms.NORMS:
        other = dict(norms.fresh(name, TINY, 3).named_parameters())
        assert all(torch.equal(p, other[n]) for n, p in first.named_parameters() if p.ndim == 2)
    assert not torch.equal(first.embedding.weight, norms.fresh("LayerNorm", TINY, 4).embedding.weight)


def test_the_deferred_norm_is_the_weightless_one():
    window = torch.randint(64, (2, 17))
    plain, deferred = (norms.fresh(name, TINY, 0).double() for name in ("SimpleRMSNorm", "weightless, deferred"))
    torch.testing.assert_close(plain(window), deferred(window), rtol=1e-6, atol=0)


def test_a_pass_reads_every_window_once():
    tokens = torch.arange(16 * 4 * 3 + 1, dtype=torch.int32)
    batches = list(itertools.islice(norms.windows(tokens, TINY, 0), 6))
    for one_pass in (batches[:3], batches[3:]):
        assert sorted(torch.cat(one_pass)[:, 0].tolist()) == list(range(0, 16 * 12, 16))


def test_steps_fit_the_time_and_the_passes():
    evaluating = TINY.evaluations * TINY.held_out_batches / 3
    steps = norms.affordable([0.01, 0.02], 90.0, 10**9, TINY)
    runs = 3 * (steps + evaluating) + len(TINY.learning_rates) * TINY.trial * steps
    assert 0.9 * 90 < 0.03 * runs < 0.94 * 90
    assert norms.affordable([1e-9], 90.0, 6401, TINY) == 2 * 100


def test_the_learning_rate_warms_up_and_decays():
    rates = [norms.schedule(step, 100, TINY) for step in range(100)]
    assert rates[:5] == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0])
    assert rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(TINY.decay, abs=1e-3)


@pytest.mark.slow
def test_runs_go_by_seed_in_their_processes(data: Path, tmp_path: Path):
    names = ("RMSNorm", "MXNorm")
    made = norms.measure(TINY, data, tmp_path / "norms.json", "cpu", 600, 3, names)
    assert all(made["learning_rate"][name] in TINY.learning_rates for name in names)
    assert [(run["seed"], run["norm"]) for run in made["runs"]] == list(itertools.product(range(3), names))
    assert all(cosine > 0.999999 for _, cosine in made["compiled_agreement"].values())
    assert json.loads((tmp_path / "norms.json").read_text()) == json.loads(json.dumps(made))


def test_the_record_is_whole(record: dict):
    expected = set(itertools.product(norms.NORMS, range(record["settings"]["seeds"])))
    assert {(run["norm"], run["seed"]) for run in record["runs"]} == expected
    assert record["passes"] <= norms.PASSES
    assert all(cosine > 0.99 for _, cosine in record["compiled_agreement"].values())
    assert {run["curve"][-1][0] for run in record["runs"]} == {record["steps"]}


def test_the_page_shows_what_the_code_and_the_record_say(record: dict):
    page = norms_table.PAGE.read_text()
    assert norms_table.written(page, record) == page, "run benchmarks/norms_table.py"


def test_the_page_names_every_norm():
    page = norms_table.PAGE.read_text()
    kinds = [kind.__name__ for _, kind, *_ in norms_table.examples()]
    assert len(kinds) >= 15
    assert all(f"| `{kind}` |" in page for kind in kinds)
