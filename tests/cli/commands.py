"""The command line, called in the process: what it prints, what it refuses, and what it leaves behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taut.cli import app

WEIGHTS = "model.safetensors"


def run(*arguments: object):
    """Run taut; what it does not explain is raised here."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments: object, code: int = 0) -> dict:
    """The one JSON object that `--json` prints, and nothing else on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout, parse_constant=pytest.fail)
    assert isinstance(found, dict)
    return found


def refused(tmp_path: Path, word: str, *arguments: object) -> None:
    """Exit code 2, the cause and the cure, no traceback, and the folder as it was."""
    before = contents(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    cause, cure = result.stderr.strip().splitlines()
    assert cause.startswith("error: ")
    assert word in cause
    assert cure.startswith("cure:  ")
    assert len(cure) > len("cure:  ")
    found = as_json(*arguments, code=2)
    assert (found["error"], found["cure"]) == (cause.removeprefix("error: "), cure.removeprefix("cure:  "))
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))
