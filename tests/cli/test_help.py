"""What the command line says of itself."""

from __future__ import annotations

from io import BytesIO, TextIOWrapper

import pytest
from cli.commands import as_json, run
from typer.testing import CliRunner

import taut
from taut.cli import app, main


def test_techniques():
    found = as_json("techniques")["techniques"]
    assert {"rewrite", "op", "module", "method"} == {row["kind"] for row in found}
    assert all(row["source"] and row["summary"] for row in found)
    assert "fold_norm" in run("techniques").stdout


def test_version_and_help():
    assert run("--version").stdout == f"taut {taut.__version__}\n"
    printed = run().output
    for verb in ("inspect", "plan", "apply", "verify", "techniques", "demo"):
        assert verb in printed


@pytest.mark.parametrize("verb", ["inspect", "plan", "apply", "verify"])
def test_the_same_options_everywhere(verb):
    printed = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output
    for option in ("--json", "--revision", "--trust-remote-code", "--dtype", "--threads"):
        assert option in printed


def test_what_the_terminal_cannot_show_is_replaced(monkeypatch):
    stdout = TextIOWrapper(BytesIO(), "ascii")
    monkeypatch.setattr("sys.stdout", stdout)
    monkeypatch.setattr("taut.cli.app", lambda: print("caf\u00e9"))
    main()
    stdout.flush()
    assert stdout.buffer.getvalue() == b"caf?\n"
