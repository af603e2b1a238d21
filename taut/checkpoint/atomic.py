"""A folder that is there whole or not at all: filled under another name beside its place, then renamed."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from taut.checkpoint.errors import BadInput

NEW, OLD = "taut", "taut-old"


def check_target(source: Path, out: Path, need: int, force: bool) -> None:
    """Clear what killed runs left beside a place, and refuse one that cannot or must not be written.

    Raises:
        BadInput: it exists (and not `force`), overlaps the source, cannot be written, or the disk is too full.
    """
    real, origin = Path(os.path.realpath(out)), Path(os.path.realpath(source))
    if real == origin or origin in real.parents or real in origin.parents:
        raise BadInput(f"{out} overlaps the source {source}", "write somewhere else")
    parent = real.parent
    if not parent.exists():
        raise BadInput(f"{parent} does not exist", "make it first")
    if not parent.is_dir():
        raise BadInput(f"{parent} is not a folder", "write somewhere else")
    if not os.access(parent, os.W_OK | os.X_OK):
        raise BadInput(f"{parent} is not writable", "write somewhere else")
    clean_up_after_the_dead(real)
    if os.path.lexists(out) and not force:
        raise BadInput(f"{out} exists", "write somewhere else, or pass --force to replace it")
    if os.path.lexists(out) and (out.is_symlink() or not out.is_dir()):
        raise BadInput(f"{out} is not a folder, so it is not replaced", "write somewhere else")
    if out.is_dir() and any(out.iterdir()) and not (out / "config.json").exists():
        raise BadInput(f"{out} is not a checkpoint (no config.json), so it is not replaced", "write somewhere else")
    free = shutil.disk_usage(parent).free
    if free < need:
        raise BadInput(f"{parent} has {free / 1e9:.3f} GB free of {need / 1e9:.3f} GB needed", "free some space")


@contextlib.contextmanager
def folder(out: Path) -> Iterator[Path]:
    """A new folder to fill; on a normal end it takes `out`'s place, on any other nothing is left of it.

    Raises:
        BadInput: the disk is full, or cannot be written.
    """
    out = Path(os.path.realpath(out))
    with _terminable():
        building = _beside(out, NEW)
        try:
            building.mkdir()
            yield building
            _sync(building)
            _take_place(building, out)
        except OSError as error:
            cure = "free some space, or write somewhere else"
            raise BadInput(f"{out}: cannot be written ({error.strerror or error})", cure) from error
        finally:
            shutil.rmtree(building, ignore_errors=True)


def clean_up_after_the_dead(out: Path) -> None:
    """Remove what killed runs left beside `out`; a folder they moved aside comes back if its place is empty."""
    pattern = re.compile(re.escape(f".{out.name}.") + rf"({OLD}|{NEW})-(\d+)-[0-9a-f]+")
    for path in sorted(out.parent.iterdir()):
        match = pattern.fullmatch(path.name)
        if not match or _alive(int(match[2])):
            continue
        if match[1] == OLD and not out.exists():
            path.rename(out)
        else:
            shutil.rmtree(path, ignore_errors=True)


def _beside(out: Path, kind: str) -> Path:
    return out.with_name(f".{out.name}.{kind}-{os.getpid()}-{secrets.token_hex(4)}")


def _alive(pid: int) -> bool:
    if os.name == "nt":  # Signal 0 asks nothing there; it interrupts.
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except OSError:
        return True
    return True


def _take_place(building: Path, out: Path) -> None:
    if not out.exists():
        building.rename(out)
        _sync_folder(out.parent)
        return
    aside = _beside(out, OLD)
    try:
        out.rename(aside)
        building.rename(out)
        _sync_folder(out.parent)
    finally:
        if not out.exists():
            aside.rename(out)
    shutil.rmtree(aside, ignore_errors=True)


def _sync(root: Path) -> None:
    """Everything below a folder reaches the disk."""
    for path, _, names in os.walk(root):
        for name in names:
            with open(os.path.join(path, name), "rb+") as file:
                os.fsync(file.fileno())
        _sync_folder(Path(path))


def _sync_folder(path: Path) -> None:
    with contextlib.suppress(PermissionError):  # Windows cannot open a folder.
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)


@contextlib.contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM raise, as SIGINT does, so that a terminated run cleans up."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
