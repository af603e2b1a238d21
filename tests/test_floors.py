"""Floors and machines on the command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taut import machine
from taut.cli import app

MODEL = str(Path(__file__).parent.parent / "taut/demo/model")


@pytest.fixture(autouse=True)
def _nothing_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))


def run(*arguments: str, code: int = 0) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"COLUMNS": "80"})
    assert result.exit_code == code, result.output
    assert max(map(len, result.stdout.splitlines()), default=0) <= 80 or "--json" in arguments
    return result.stdout


def test_floors_of_a_named_machine():
    found = json.loads(run("inspect", MODEL, "--machine", "h200-sxm", "--ops", "--json"))
    assert found["machine"] == "NVIDIA H200 SXM"
    decode, prefill = found["cost"]
    assert (decode["workload"], decode["length"], decode["context"]) == ("decode", 1, 511)
    assert (prefill["workload"], prefill["length"]) == ("prefill", 512)
    for cost in (decode, prefill):
        assert sum(kind["share"] for kind in cost["kinds"]) == pytest.approx(1)
        assert sum(op["seconds"] for op in cost["ops"]) == pytest.approx(cost["one_by_one_s"])
        assert len(cost["ops"]) == cost["calls"]
    assert decode["floor_s"] == pytest.approx(decode["fused_bytes"] / 4.8e12)
    assert decode["fused_bytes"] == pytest.approx(found["bytes"], rel=0.1)  # no table, but a cache


def test_floors_for_people():
    printed = run("inspect", MODEL, "--machine", "h200-sxm")
    assert "decode step behind 511 tokens: floor" in printed
    assert "linear     43x" in printed
    assert "lm_head" not in printed
    assert "lm_head" in run("inspect", MODEL, "--machine", "h200-sxm", "--ops")


def test_without_a_machine_there_is_a_hint_and_no_time():
    found = json.loads(run("inspect", MODEL, "--json"))
    assert found["machine"] is None
    assert "floor_s" not in found["cost"][0]
    assert "taut machines --measure" in run("inspect", MODEL)


def test_an_unknown_machine_is_bad_input():
    result = CliRunner().invoke(app, ["inspect", MODEL, "--machine", "abacus"])
    assert result.exit_code == 2
    assert "h200-sxm" in result.stderr
    assert "cure" in result.stderr


def test_machines_are_listed_and_measured(monkeypatch):
    assert "taut machines --measure" in run("machines")
    monkeypatch.setattr(machine, "read_size", lambda: 2**22)
    monkeypatch.setattr(machine, "_peaks", lambda tell: [("float32", machine.Figure(1e9, "measured", "a test"))])
    found = json.loads(run("machines", "--measure", "--json"))
    assert found["this"]["bandwidths"]["memory"]["origin"] == "measured"
    assert set(found["machines"]) == set(machine.names())
    assert machine.cpu_name().split()[0] in run("machines")
    assert "(measured)" in run("inspect", MODEL)
