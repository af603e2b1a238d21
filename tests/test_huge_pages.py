"""Large pages change where tensors lie and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from taut.huge_pages import PAIR, SIZE, collapse, collapse_meanwhile, side_by_side


def on_large_pages() -> int:
    """Bytes of this process."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("AnonHugePages"))


def test_values_stay_and_their_memory_is_on_large_pages():
    values = torch.arange(2**23)
    kept, before = values.clone(), on_large_pages() if SIZE.exists() else 0
    moved = collapse([values])
    assert torch.equal(values, kept)
    if not moved:
        pytest.skip("LARGE PAGES NOT TESTED: this system gives none")
    assert moved >= values.nbytes - 2 * int(SIZE.read_text())
    assert on_large_pages() - before >= moved - 2 * int(SIZE.read_text())
    assert collapse([values]) == moved


def test_meanwhile_too():
    values = torch.arange(2**20)
    collapse_meanwhile([values]).join()
    assert torch.equal(values, torch.arange(2**20))


def test_nothing_to_move():
    assert collapse([]) == 0


def test_rooms_lie_side_by_side():
    sizes = [7, 2**24, 4]
    rooms = side_by_side(sizes)
    assert [room.shape for room in rooms] == [(size,) for size in sizes]
    assert [room.data_ptr() % PAIR for room in rooms] == [0, 0, 0]
    assert [room.data_ptr() - rooms[0].data_ptr() for room in rooms] == [0, PAIR, PAIR + 2**24]
    rooms[1].fill_(1)
    assert not side_by_side([])
    moved = collapse(rooms[1:2])
    if not moved:
        pytest.skip("LARGE PAGES NOT TESTED: this system gives none")
    assert moved >= 2**24 - 2 * int(SIZE.read_text())
