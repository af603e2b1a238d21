"""Large pages change where tensors lie and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch
from torch import Tensor

from taut.huge_pages import PAIR, SIZE, collapse, collapse_meanwhile, side_by_side
from taut.ops._laid import copied


def copies_of(tensors: list[Tensor]) -> list[Tensor]:
    rooms = side_by_side([t.nbytes for t in tensors])
    return [copied(t).write(room) for t, room in zip(tensors, rooms, strict=True)]


def on_large_pages(t: Tensor) -> int:
    """Bytes of the large pages in the mappings that the tensor lies in.

    Not of the whole process: an allocator may give memory that was on large pages before.
    """
    size, lies_here = 0, False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match("([0-9a-f]+)-([0-9a-f]+) ", line):
            first, last = (int(bound, 16) for bound in bounds.groups())
            lies_here = first < t.data_ptr() + t.nbytes and t.data_ptr() < last
        elif lies_here and line.startswith("AnonHugePages:"):
            size += int(line.split()[1]) * 1024
    return size


def test_values_stay_and_their_memory_is_on_large_pages():
    values = torch.arange(2**23)
    kept = values.clone()
    moved = collapse([values])
    assert torch.equal(values, kept)
    if not moved:
        pytest.skip("LARGE PAGES NOT TESTED: this system gives none")
    assert moved >= values.nbytes - 2 * int(SIZE.read_text())
    assert on_large_pages(values) >= moved - 2 * int(SIZE.read_text())
    assert collapse([values]) == moved


def test_meanwhile_too():
    values = torch.arange(2**20)
    collapse_meanwhile([values]).join()
    assert torch.equal(values, torch.arange(2**20))


def test_nothing_to_move():
    assert collapse([]) == 0


def test_copies_lie_side_by_side():
    numbers, square = torch.arange(7, dtype=torch.int8), torch.arange(2.0**22).view(2**11, 2**11)
    tensors = [numbers, square.T, torch.arange(3).bfloat16()[1:]]
    copies = copies_of(tensors)
    for copy, t in zip(copies, tensors, strict=True):
        torch.testing.assert_close(copy, t, rtol=0, atol=0)
        assert copy.is_contiguous()
    assert [copy.data_ptr() % PAIR for copy in copies] == [0, 0, 0]
    assert [copy.data_ptr() - copies[0].data_ptr() for copy in copies] == [0, PAIR, PAIR + square.nbytes]
    assert not copies_of([torch.nn.Parameter(square)])[0].requires_grad
    assert not copies_of([])
    if not collapse(copies[1:2]):
        pytest.skip("LARGE PAGES NOT TESTED: this system gives none")
    assert on_large_pages(copies[1]) >= square.nbytes - 2 * int(SIZE.read_text())
