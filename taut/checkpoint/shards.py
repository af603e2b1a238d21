"""One weight file: its header read and checked, its tensors described, its bytes read where they lie."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.checkpoint.errors import BadInput

DTYPES: dict[str, torch.dtype] = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "U16": torch.uint16,
    "I16": torch.int16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
CODES = {dtype: code for code, dtype in DTYPES.items()}
LONGEST_HEADER = 100_000_000
RELOAD = "download or copy the file again"


@dataclass(frozen=True)
class TensorInfo:
    """Where a tensor lies: `offset` and `nbytes` count bytes in `file` (a name within the checkpoint's folder)."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: str
    offset: int
    nbytes: int

    @property
    def numel(self) -> int:
        return math.prod(self.shape)


@dataclass(frozen=True)
class Shard:
    """A weight file. `header` holds a safetensors file's first bytes, length included; None for a pickled file,
    whose tensors are in `loaded` instead."""

    name: str
    path: Path
    tensors: dict[str, TensorInfo]
    header: bytes | None = None
    metadata: dict[str, str] | None = None
    loaded: dict[str, Tensor] | None = None

    def read_bytes(self, name: str, start: int, buffer: np.ndarray) -> None:
        """Fill `buffer` (uint8) with a tensor's bytes from `start` on."""
        if self.loaded is None:
            read_at(self.path, self.tensors[name].offset + start, buffer)
        else:
            flat = self.loaded[name].contiguous().flatten().view(torch.uint8)
            buffer[:] = flat[start : start + buffer.size].numpy()


def read_at(path: Path, offset: int, buffer: np.ndarray) -> None:
    """Fill `buffer` (uint8) from a file. Plain reads, no memory map: what was read and dropped stays dropped."""
    view = buffer.data
    with open(path, "rb", buffering=0) as file:
        file.seek(offset)
        while view:
            count = file.readinto(view)
            if not count:
                raise BadInput(f"{path}: ends before byte {offset + buffer.size}", RELOAD)
            view = view[count:]


def open_safetensors(path: Path, name: str) -> Shard:
    """Read and check a safetensors file's header.

    Raises:
        BadInput: the file is truncated, or not a well-formed safetensors file.
    """
    size = path.stat().st_size
    with open(path, "rb") as file:
        start = file.read(8)
        length = int.from_bytes(start, "little")
        if len(start) < 8 or length > min(size - 8, LONGEST_HEADER):
            raise BadInput(f"{path}: truncated, or not a safetensors file", RELOAD)
        text = file.read(length)
    header = _parse(path, text)
    metadata = header.pop("__metadata__", None)
    if metadata is not None and not _is_strings(metadata):
        raise _corrupt(path, "its __metadata__ does not map strings to strings")
    tensors = {key: _entry(path, name, key, value, 8 + length) for key, value in header.items()}
    _check_spans(path, tensors, 8 + length, size)
    return Shard(name, path, tensors, start + text, metadata)


def _corrupt(path: Path, why: str) -> BadInput:
    return BadInput(f"{path}: corrupt safetensors header: {why}", RELOAD)


def _parse(path: Path, text: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise _corrupt(path, "a name appears twice")
        return found

    try:
        header = json.loads(text.decode(), object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        raise _corrupt(path, f"not JSON ({error})") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "not a JSON object")
    return header


def _is_strings(value: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(v, str) for v in value.values())


def _is_naturals(value: Any) -> bool:
    return isinstance(value, list) and all(type(v) is int and v >= 0 for v in value)


def _entry(path: Path, file: str, name: str, entry: Any, base: int) -> TensorInfo:
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        raise _corrupt(path, f"{name!r} does not have dtype, shape and data_offsets")
    code, shape, span = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(code, str) or code not in DTYPES:
        raise BadInput(f"{path}: {name!r} has the dtype {code!r}, which taut does not know", "convert it first")
    if not _is_naturals(shape) or not _is_naturals(span) or len(span) != 2:
        raise _corrupt(path, f"{name!r} has the shape {shape!r} and the data_offsets {span!r}")
    dtype, nbytes = DTYPES[code], span[1] - span[0]
    if math.prod(shape) * dtype.itemsize != nbytes:
        raise _corrupt(path, f"{name!r}, {code} {shape}, takes {nbytes} bytes")
    return TensorInfo(dtype, tuple(shape), file, base + span[0], nbytes)


def _check_spans(path: Path, tensors: dict[str, TensorInfo], start: int, size: int) -> None:
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise _corrupt(path, f"{name!r} does not begin where the tensor before it ends")
        end = info.offset + info.nbytes
    if end > size:
        raise BadInput(f"{path}: truncated: {size} bytes of {end}", RELOAD)
    if end < size:
        raise _corrupt(path, f"{size - end} bytes belong to no tensor")


def open_pickle(path: Path, name: str) -> Shard:
    """Open a torch file of plain tensors, mapped where its format allows. No code in it is run.

    Raises:
        BadInput: the file is not one, or holds more than tensors.
    """
    import zipfile

    try:
        loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
    except Exception as error:
        first = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise BadInput(
            f"{path}: cannot be read with weights_only=True ({first})", "convert it to safetensors"
        ) from None
    if not isinstance(loaded, dict) or not all(isinstance(v, Tensor) for v in loaded.values()):
        raise BadInput(f"{path}: does not hold a plain dictionary of tensors", "convert it to safetensors")
    tensors = {}
    for key, tensor in loaded.items():
        if tensor.dtype not in CODES:
            raise BadInput(f"{path}: {key!r} has the dtype {tensor.dtype}", "convert it first")
        nbytes = tensor.numel() * tensor.element_size()
        tensors[key] = TensorInfo(tensor.dtype, tuple(tensor.shape), name, 0, nbytes)
    return Shard(name, path, tensors, loaded=loaded)
