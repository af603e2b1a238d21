"""Any architecture: a class of the installed transformers is rewritten and proved, or the survey says why not."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from taut.proof import SAME_FUNCTION

ROOT = Path(__file__).parent.parent
REASONED = ("not built", "not traced", "nothing applies")
SOUND = ("passed", *REASONED)


def _survey():
    spec = importlib.util.spec_from_file_location("survey", ROOT / "benchmarks" / "survey.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["survey"] = module
    spec.loader.exec_module(module)
    return module


survey = _survey()
SAMPLE = survey.sample(3)


@pytest.mark.parametrize("name", SAMPLE)
def test_a_class_is_proved_or_refused_with_a_reason(name):
    record = survey.examine(name, SAMPLE[name])
    assert record.verdict in SOUND, record
    assert record.verdict in ("passed", "nothing applies") or record.reason, record


def test_the_sample_has_every_kind_and_is_taken_from_the_library():
    assert {survey.classes()[name] for name in SAMPLE} == set(survey.MAPPINGS)
    assert len(survey.classes()) > 500


@pytest.mark.slow
def test_most_classes_with_a_norm_in_front_of_a_linear_layer_pass(tmp_path):
    """At least 80 % of those that count, and no fewer than 100; prints the rest and why."""
    records = survey.run(survey.classes(), tmp_path / "survey.json")
    counted = [record for record in records if record.counts]
    passed = [record for record in counted if record.verdict == "passed"]
    for record in counted:
        if record.verdict != "passed":
            print(record.name, record.verdict, record.reason)
    assert len(passed) >= 100
    assert len(passed) >= 0.8 * len(counted)
    assert all(record.float64_error <= SAME_FUNCTION for record in records)
