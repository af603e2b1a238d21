"""docs/checks.md names tests that exist, and every one of its figures' files."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "checks.md").read_text()
NAMED = sorted(set(re.findall(r"`([\w/]+\.py)::(\w+)`", PAGE)))


def test_the_page_names_many():
    assert len(NAMED) > 80


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_a_test_that_is_named_exists(file: str, name: str):
    source = (ROOT / "tests" / file).read_text()
    assert re.search(rf"^def {name}\(", source, re.M), f"{file} has no {name}"


def test_the_files_that_are_named_exist():
    for path in re.findall(r"`((?:benchmarks|taut)/[\w/.]+)`", PAGE):
        assert (ROOT / path).exists(), path
    for path in re.findall(r"`(\w+\.json)`", PAGE):
        assert (ROOT / "benchmarks" / "results" / "h200" / path).exists(), path


def test_no_row_lacks_a_verdict():
    rows = [line for line in PAGE.splitlines() if line.startswith("| ") and not line.startswith("| check")]
    assert len(rows) > 70
    assert all(len(re.split(r"(?<!\\) \| ", line.strip("| "))) == 3 for line in rows)
