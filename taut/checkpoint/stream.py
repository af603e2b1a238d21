"""Stream tensors from a checkpoint into files, block by block, in bounded memory.

A block is read, tested for infinities and NaN, edited, written, and read back from the file it was written to. What
came back is compared with the source (untouched tensors), with the rounded block (general edits), or judged by
`kernels.check`, which shares no rounding code with the kernel that wrote it (`Scale`). Threads take whole blocks each,
so that one waits for the disk while another computes.
"""

from __future__ import annotations

import math
import os
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from taut.checkpoint.edits import Copy, Edit, Scale
from taut.checkpoint.read import Checkpoint
from taut.checkpoint.rounding import CODES, FLOATS, Lost, lost, round_once
from taut.checkpoint.shards import TensorInfo, read_at

BLOCK = 1 << 20  # Bytes. What is read, written and read back fits a core's cache; measured, 8 MB costs twice the time.
EDIT = 1 << 20  # Elements of a general edit, in float64.
MOST_THREADS = 4
FORMATS = {torch.float16: (10, 5), torch.bfloat16: (7, 8), torch.float32: (23, 8)}
BITS = {1: np.uint8, 2: np.uint16, 4: np.uint32, 8: np.uint64}


class Mismatch(Exception):
    """A file does not hold what was written to it."""


@dataclass(frozen=True)
class Block:
    """Elements [start, stop) of a tensor, with the tensor's place in the file that is being written."""

    name: str
    info: TensorInfo
    edit: Edit | None
    path: Path
    start: int
    stop: int


@dataclass
class Findings:
    """What streaming noticed: values that are not finite, and values that left their dtype's normal range."""

    nonfinite: dict[str, int] = field(default_factory=dict)
    lost: dict[str, Lost] = field(default_factory=dict)
    written: int = 0

    def add(self, block: Block, nonfinite: int, gone: Lost) -> None:
        if nonfinite:
            self.nonfinite[block.name] = self.nonfinite.get(block.name, 0) + nonfinite
        if gone != Lost():
            self.lost[block.name] = self.lost.get(block.name, Lost()) + gone
        self.written += (block.stop - block.start) * block.info.dtype.itemsize

    def out_of_range(self, dtypes: Callable[[str], torch.dtype]) -> dict[str, str]:
        reasons = {name: gone.reason(dtypes(name)) for name, gone in self.lost.items()}
        return {name: reason for name, reason in reasons.items() if reason}


def blocks(name: str, info: TensorInfo, edit: Edit | None, path: Path) -> Iterator[Block]:
    """A tensor's blocks; a general edit takes whole rows, anything else any run of elements."""
    step = BLOCK // info.dtype.itemsize
    if edit is not None and not isinstance(edit, Scale | Copy):
        row = max(1, math.prod(info.shape[1:]))
        step = row * max(1, EDIT // row)
    for start in range(0, info.numel, step):
        yield Block(name, info, edit, path, start, min(start + step, info.numel))


class Streamer:
    """Processes blocks of a source checkpoint; each thread keeps its own buffers."""

    def __init__(self, source: Checkpoint, verify: bool = True) -> None:
        self.source = source
        self.verify = verify
        self._local = threading.local()

    def run(self, todo: Iterable[Block], progress: Callable[[int], None] | None = None) -> Findings:
        """Process all blocks, some at a time, and report; `progress` hears of the bytes written so far."""
        findings, running = Findings(), deque[tuple[Block, Future]]()
        threads = max(2, min(MOST_THREADS, torch.get_num_threads()))
        pool = ThreadPoolExecutor(threads, "taut-stream")
        try:
            for block in todo:
                running.append((block, pool.submit(self._process, block)))
                if len(running) > 2 * threads:
                    _collect(running, findings, progress)
            while running:
                _collect(running, findings, progress)
        finally:
            pool.shutdown(wait=True, cancel_futures=True)
        return findings

    def _process(self, block: Block) -> tuple[int, Lost]:
        found = self._stream(block)
        _start_writing(block)
        return found

    def _stream(self, block: Block) -> tuple[int, Lost]:
        if block.edit is None or isinstance(block.edit, Copy):
            return self._copy(block, block.edit.name if block.edit else block.name)
        if isinstance(block.edit, Scale) and block.info.dtype in FORMATS:
            return self._scale(block, block.edit)
        return self._edit(block, block.edit)

    def _copy(self, block: Block, name: str) -> tuple[int, Lost]:
        source = self._read(block, name)
        self._write(block, source)
        if self.verify:
            from taut.checkpoint.kernels import count_different

            unit = np.dtype(BITS[8] if source.size % 8 == 0 else np.uint8)
            _agree(block, count_different(source.view(unit), self._read_back(block).view(unit)))
        return _count_nonfinite(source, block.info.dtype), Lost()

    def _scale(self, block: Block, edit: Scale) -> tuple[int, Lost]:
        from taut.checkpoint.kernels import check, scale

        source = self._read(block, edit.name)
        bad = _count_nonfinite(source, block.info.dtype)
        if bad:
            return bad, Lost()
        bits, form = BITS[block.info.dtype.itemsize], FORMATS[block.info.dtype]
        place = (*edit.factors, block.start, edit.inner)
        target = self._buffer("target", source.size)
        over, under = scale(source.view(bits), *place, target.view(bits), *form)
        self._write(block, target)
        if self.verify:
            _agree(block, check(source.view(bits), *place, self._read_back(block).view(bits), *form))
        return 0, Lost(int(over), int(under))

    def _edit(self, block: Block, edit: Edit) -> tuple[int, Lost]:
        row = max(1, math.prod(block.info.shape[1:]))
        rows = slice(block.start // row, block.stop // row)
        exact = edit.block(self.source.read, rows) if block.info.shape else edit.block(self.source.read, slice(None))
        count = block.stop - block.start
        if exact.numel() != count:
            raise ValueError(f"{block.name}: the edit gave {tuple(exact.shape)} for rows {rows}")
        bad = int((~exact.isfinite()).sum())
        if block.info.dtype not in (*FLOATS, *CODES):
            raise TypeError(f"{block.name}: cannot round to {block.info.dtype}")
        rounded = round_once(exact.contiguous(), block.info.dtype)
        raw = rounded.flatten().view(torch.uint8).numpy()
        self._write(block, raw)
        if self.verify:
            _agree(block, int((raw != self._read_back(block)).sum()))
        old = self.source.tensors.get(block.name)
        before = self.source.read(block.name, rows) if old and old.shape == block.info.shape and old.shape else None
        return bad, lost(before, exact, rounded)

    def _read(self, block: Block, name: str) -> np.ndarray:
        size = block.info.dtype.itemsize
        buffer = self._buffer("source", (block.stop - block.start) * size)
        self.source.read_bytes(name, block.start * size, buffer)
        return buffer

    def _write(self, block: Block, raw: np.ndarray) -> None:
        with open(block.path, "r+b", buffering=0) as file:
            file.seek(block.info.offset + block.start * block.info.dtype.itemsize)
            view = raw.data
            while view:
                view = view[file.write(view) :]

    def _read_back(self, block: Block) -> np.ndarray:
        size = block.info.dtype.itemsize
        buffer = self._buffer("back", (block.stop - block.start) * size)
        read_at(block.path, block.info.offset + block.start * size, buffer)
        return buffer

    def _buffer(self, role: str, size: int) -> np.ndarray:
        buffer = getattr(self._local, role, None)
        if buffer is None or buffer.size < size:
            buffer = np.empty(max(size, BLOCK), np.uint8)
            setattr(self._local, role, buffer)
        return buffer[:size]


def _collect(running: deque[tuple[Block, Future]], findings: Findings, progress: Callable[[int], None] | None) -> None:
    block, future = running.popleft()
    findings.add(block, *future.result())
    if progress is not None:
        progress(findings.written)


def _start_writing(block: Block) -> None:
    """Ask the system to put a block on the disk now: waiting for the final sync would leave the disk idle."""
    if hasattr(os, "posix_fadvise"):
        size = block.info.dtype.itemsize
        place = (block.info.offset + block.start * size, (block.stop - block.start) * size)
        with open(block.path, "rb", buffering=0) as file:
            os.posix_fadvise(file.fileno(), *place, os.POSIX_FADV_DONTNEED)


def _agree(block: Block, different: int) -> None:
    if different:
        raise Mismatch(f"{block.path}: {block.name}: {different} values are not what they should be")


def _count_nonfinite(raw: np.ndarray, dtype: torch.dtype) -> int:
    if dtype not in FLOATS:
        return 0
    from taut.checkpoint.kernels import count_nonfinite

    bits = BITS[dtype.itemsize]
    mantissa, exponent = (52, 11) if dtype is torch.float64 else FORMATS[dtype]
    return count_nonfinite(raw.view(bits), bits(((1 << exponent) - 1) << mantissa))
