"""Time on a GPU as decoding meets it: a CUDA graph of many calls, each on a weight of its own from memory."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from typing import Any

import torch

Call = Callable[[int], Any]
"""A call of the thing timed, on the weights of a number."""


def graph(call: Call, copies: int) -> torch.cuda.CUDAGraph:
    """A graph of a call on every one of the copies, in order."""
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for i in range(min(3, copies)):
            call(i)
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        for i in range(copies):
            call(i)
    return captured


def microseconds(calls: Sequence[Call], copies: int, repeats: int = 15) -> list[float]:
    """The median time of one call of each, replayed in turn so that all meet the same state of the machine."""
    graphs = [graph(call, copies) for call in calls]
    times: list[list[float]] = [[] for _ in graphs]
    for captured in graphs:
        captured.replay()
    for _ in range(repeats):
        for captured, seen in zip(graphs, times, strict=True):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            captured.replay()
            end.record()
            end.synchronize()
            seen.append(start.elapsed_time(end) * 1e3 / copies)
    return [statistics.median(seen) for seen in times]


def copies_for(nbytes: int, least: int = 8, room: int = 200 * 2**20, most: int = 256) -> int:
    """How many weights of a size are needed so that none is found in a cache."""
    return max(least, min(most, -(-room // nbytes)))
