"""What every command has in common: errors, what goes to stdout, and progress."""

from __future__ import annotations

import errno
import json
import logging
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

import typer

REFUSED = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM)
"""What the system says of a disk that is full, or that taut may not read or write."""


@contextmanager
def command(as_json: bool, threads: int | None, quiet: bool = True) -> Iterator[None]:
    """Set threads and logging, and turn what the user can mend into a cause, a cure and exit code 2.

    `quiet` keeps transformers quiet, for which it is imported.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        if quiet:
            quiet_transformers()
        yield
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        code, cause, cure, evidence = _explain(error)
        if code is None:
            raise
        _refuse(as_json, cause, cure, evidence)
        raise typer.Exit(code) from None


def _refuse(as_json: bool, cause: str, cure: str, evidence: dict[str, Any] | None) -> None:
    if as_json:
        with suppress(OSError):  # it may be stdout that cannot be written
            print(json.dumps({"error": cause, "cure": cure} | ({"evidence": _finite(evidence)} if evidence else {})))
            return
    print(f"error: {cause}\ncure:  {cure}", file=sys.stderr)


def quiet_transformers() -> None:
    """Keep transformers' progress bars and remarks to itself; what it raises is told."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _explain(error: Exception) -> tuple[int | None, str, str, dict[str, Any] | None]:
    from taut.checkpoint import BadInput, Mismatch
    from taut.plans import BadPlan
    from taut.proof import NotProved

    if isinstance(error, NotProved):
        return 1, str(error), "nothing was written; see the evidence, and report it", error.evidence.as_dict()
    if isinstance(error, BadInput):
        return 2, str(error), error.cure, None
    if isinstance(error, Mismatch):
        return 1, str(error), "nothing was left behind; check the disk, then try again", None
    if isinstance(error, BadPlan):
        return 2, str(error), "make a new plan with `taut plan`", None
    if isinstance(error, OSError) and error.errno in REFUSED:
        return 2, f"{error.filename or 'the output'}: {error.strerror}", "make room, or see to the permissions", None
    return None, "", "", None


def answer(as_json: bool, record: dict[str, Any], show: Callable[[], None]) -> None:
    """Print what a command has found, for scripts or for people."""
    if as_json:
        print(json.dumps(_finite(record), default=str))
    else:
        show()


def _finite(value: Any) -> Any:
    """JSON has neither infinities nor NaN: null stands for them."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: _finite(held) for key, held in value.items()}
    return [_finite(held) for held in value] if isinstance(value, list | tuple) else value


@contextmanager
def progress_bar() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for what takes long; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task, now = bar.add_task("reading", total=None), ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:
                bar.reset(task, description=what, total=None)
                now = what
            bar.update(task, completed=done, total=total if total > 1 else None)

        yield report
