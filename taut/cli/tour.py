"""What taut can do, for people who have just come: techniques and demo."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taut.cli.command import answer, command
from taut.cli.options import Json


def techniques(as_json: Json = False) -> None:
    """List every technique with its source."""
    with command(as_json, None):
        from taut import show
        from taut.techniques import catalogue

        rows = catalogue()
        answer(as_json, {"techniques": [row.as_dict() for row in rows]}, lambda: show.techniques(rows))


def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the rewritten model here.")] = None,
    as_json: Json = False,
) -> None:
    """Run the main job on the model that comes with taut: inspect, apply, verify, compare."""
    with command(as_json, None):
        from taut import show
        from taut.demonstrate import demonstrate

        shown = demonstrate(out, (lambda what: None) if as_json else show.told)
        answer(as_json, shown.as_dict(), lambda: show.demonstration(shown))
        if not shown.passed:
            raise typer.Exit(1)
