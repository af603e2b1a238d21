"""The command line: the verbs of the Python API, with tables for people and `--json` for scripts."""

from __future__ import annotations

import gc
import sys
from io import TextIOWrapper
from typing import Annotated

import typer

from taut import __version__
from taut.cli.checkpoints import apply, inspect, plan, verify
from taut.cli.speed import bench, generate, machines
from taut.cli.tour import demo, techniques

app = typer.Typer(
    help="Take the slack out of a transformer, and prove that it is still the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
for verb in (inspect, plan, apply, verify, techniques, bench, generate, machines, demo):
    app.command()(verb)


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"taut {__version__}")
        raise typer.Exit


def main() -> None:
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="replace")  # a model may write what the terminal's encoding lacks
    try:
        app()
    finally:
        gc.freeze()  # all that is left goes with the process: to search it for cycles first takes torch a second
