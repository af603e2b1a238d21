import errno
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from checkpoint.made import contents, single

from taut.checkpoint import BadInput, Fill, atomic, open_checkpoint, stream, write_checkpoint


def write(source, out, **options):
    write_checkpoint(open_checkpoint(source), out, {}, record={}, **options)


def refused(source, out, *words, **options):
    with pytest.raises(BadInput) as caught:
        write(source, out, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert caught.value.cure


@pytest.fixture
def source(tmp_path):
    return single(tmp_path / "a")


def test_places_that_are_refused(tmp_path, source):
    before = contents(tmp_path)
    refused(source, source, "overlaps", force=True)
    refused(source, source / "out", "overlaps")
    refused(source, tmp_path, "overlaps", force=True)
    (tmp_path / "link").symlink_to(source, target_is_directory=True)
    refused(source, tmp_path / "link", "overlaps", force=True)
    refused(source, tmp_path / "no" / "parent", "does not exist")
    (tmp_path / "link").unlink()
    assert contents(tmp_path) == before


def test_an_output_that_exists(tmp_path, source):
    write(source, tmp_path / "b")
    (tmp_path / "b" / "mine").write_text("x")
    refused(source, tmp_path / "b", "exists")
    assert (tmp_path / "b" / "mine").exists()
    write(source, tmp_path / "b", force=True)
    assert contents(tmp_path / "b").keys() == contents(source).keys() | {"taut.json"}
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_force_replaces_checkpoints_alone(tmp_path, source):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    refused(source, tmp_path / "home", "not a checkpoint", force=True)
    (tmp_path / "file").write_text("x")
    refused(source, tmp_path / "file", "not a folder", force=True)
    (tmp_path / "link").symlink_to(tmp_path / "home", target_is_directory=True)
    refused(source, tmp_path / "link", "not a folder", force=True)
    (tmp_path / "bare").mkdir()
    write(source, tmp_path / "bare", force=True)
    assert (tmp_path / "bare" / "config.json").exists()


def test_a_parent_that_is_not_writable(tmp_path, source, monkeypatch):
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    refused(source, tmp_path / "b", "not writable")


def test_too_little_space_is_seen_before_anything_is_written(tmp_path, source, monkeypatch):
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 3000))
    refused(source, tmp_path / "b", "GB free")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO])
def test_a_disk_that_fills_up_leaves_nothing(tmp_path, source, monkeypatch, code):
    done = stream.Streamer._write

    def fail(self, block, raw):
        if block.name == "gain":
            raise OSError(code, os.strerror(code))
        done(self, block, raw)

    monkeypatch.setattr(stream.Streamer, "_write", fail)
    refused(source, tmp_path / "b", "cannot be written", os.strerror(code))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


@pytest.fixture
def small_disk(tmp_path):
    place = tmp_path / "disk"
    place.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", place], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("no right to mount a small disk")
    yield place
    subprocess.run(["umount", place], check=True)


@pytest.mark.parametrize("foreseen", [True, False])
def test_a_disk_that_is_really_full(tmp_path, small_disk, monkeypatch, foreseen):
    source = single(tmp_path / "a", {"w": torch.zeros(1 << 18)})
    if not foreseen:
        usage = namedtuple("usage", "total used free")
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10**9, 0, 10**9))
    refused(source, small_disk / "b", "GB free" if foreseen else "No space left")
    assert list(small_disk.iterdir()) == []


SLOW = """
import signal, sys, time, torch
from taut.checkpoint import open_checkpoint, write_checkpoint

signal.signal(signal.SIGINT, signal.default_int_handler)  # which a process that was started in the background ignores

class Slow:
    shape, dtype = (64, 33), torch.bfloat16
    def block(self, read, rows):
        print("started", flush=True)
        time.sleep(float(sys.argv[3]))
        return read("big.weight", rows).double()

if len(sys.argv) > 4:
    import resource
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, 2000))
write_checkpoint(open_checkpoint(sys.argv[1]), __import__("pathlib").Path(sys.argv[2]), {"big.weight": Slow()},
                 record={}, force=True)
"""


def start(source: Path, out: Path, seconds: float, *more: str) -> subprocess.Popen:
    command = [sys.executable, "-c", SLOW, str(source), str(out), str(seconds), *more]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith("."))


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_runs_clean_up(tmp_path, source, number):
    before = contents(source)
    with start(source, tmp_path / "b", 1) as run:
        assert run.stdout is not None
        assert run.stdout.readline() == "started\n"
        assert leftovers(tmp_path)
        run.send_signal(number)
    assert run.returncode != 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]
    assert contents(source) == before


@pytest.mark.parametrize("replacing", [False, True])
def test_a_killed_run_leaves_no_partial_target_and_the_next_one_cleans_up(tmp_path, source, replacing):
    if replacing:
        write(source, tmp_path / "b")
    before = contents(tmp_path)
    with start(source, tmp_path / "b", 60) as run:
        assert run.stdout is not None
        run.stdout.readline()
        run.kill()
    assert len(leftovers(tmp_path)) == 1
    assert {name: data for name, data in contents(tmp_path).items() if not name.startswith(".")} == before
    write(source, tmp_path / "b", force=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a", "b"]


def test_a_file_size_limit_leaves_nothing(tmp_path, source):
    with start(source, tmp_path / "b", 0, "limited") as run:
        _, errors = run.communicate()
    assert "BadInput" in errors
    assert "File too large" in errors
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a"]


def test_killed_between_the_two_renames(tmp_path, source):
    """The old folder had been moved aside, the new one not yet moved in."""
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    write(source, tmp_path / "b")
    before = contents(tmp_path / "b")
    (tmp_path / "b").rename(tmp_path / f".b.taut-old-{dead.pid}-0123abcd")
    (tmp_path / f".b.taut-{dead.pid}-0123abcd").mkdir()
    atomic.clean_up_after_the_dead(tmp_path / "b")
    assert contents(tmp_path / "b") == before
    assert leftovers(tmp_path) == []


def test_the_living_and_the_unrelated_are_left_alone(tmp_path, source):
    names = [f".b.taut-{os.getpid()}-0123abcd", ".b.taut-x", ".c.taut-1-00", ".b.taut-999999999-0123abcd.txt"]
    for name in names:
        (tmp_path / name).mkdir()
    write(source, tmp_path / "b")
    assert leftovers(tmp_path) == sorted(names)


def test_a_failed_replacement_puts_the_old_one_back(tmp_path, source, monkeypatch):
    write(source, tmp_path / "b")
    before = contents(tmp_path / "b")
    rename = Path.rename

    def fail(self, target):
        if ".taut-old-" not in self.name and self.name.startswith("."):
            raise OSError(errno.EIO, "broken")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    refused(source, tmp_path / "b", "broken", force=True)
    assert contents(tmp_path / "b") == before
    assert leftovers(tmp_path) == []


def test_the_target_is_complete_whenever_it_is_there(tmp_path, source):
    """Watch from outside while it is replaced again and again."""
    checkpoint = open_checkpoint(source)
    want = contents(source).keys() | {"taut.json"}
    command = "import sys,os,time\nwhile True:\n p=sys.argv[1]\n"
    command += " try: n=len(os.listdir(p))\n except FileNotFoundError: continue\n"
    command += f" if n not in (0, {len(want)}): print(n, flush=True)\n"
    with subprocess.Popen([sys.executable, "-c", command, str(tmp_path / "b")], stdout=subprocess.PIPE) as watcher:
        time.sleep(0.2)
        for _ in range(10):
            edit = {"gain": Fill((5,), torch.bfloat16, 1.0)}
            write_checkpoint(checkpoint, tmp_path / "b", edit, record={}, force=True)
        watcher.kill()
        assert watcher.stdout is not None
        assert watcher.stdout.read() == b""
