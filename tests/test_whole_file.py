"""A file is written whole, or what was there stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from taut.checkpoint import BadInput
from taut.whole_file import whole_file, write_text


def test_an_interruption_leaves_what_was_there(tmp_path: Path) -> None:
    kept = tmp_path / "plan.json"
    kept.write_text("old")

    def stopped() -> None:
        with whole_file(kept) as part:
            part.write_text("half")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    assert kept.read_text() == "old"
    assert os.listdir(tmp_path) == ["plan.json"]


def test_the_rights_and_the_link_stay(tmp_path: Path) -> None:
    kept, link = tmp_path / "kept", tmp_path / "link"
    kept.write_text("old")
    kept.chmod(0o640)
    link.symlink_to(kept)
    write_text(link, "new")
    assert link.is_symlink()
    assert kept.read_text() == "new"
    assert kept.stat().st_mode & 0o777 == 0o640


def test_a_new_file_has_the_usual_rights(tmp_path: Path) -> None:
    (tmp_path / "usual").touch()
    write_text(tmp_path / "new", "text")
    assert (tmp_path / "new").stat().st_mode == (tmp_path / "usual").stat().st_mode


def test_a_pipe_is_written_to(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = os.open(pipe, os.O_RDONLY | os.O_NONBLOCK)
    write_text(pipe, "text")
    assert os.read(reader, 10) == b"text"
    os.close(reader)


def test_a_folder_that_does_not_exist_is_told(tmp_path: Path) -> None:
    with pytest.raises(BadInput, match="cannot write"):
        write_text(tmp_path / "none" / "plan.json", "text")
