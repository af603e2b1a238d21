"""Open a checkpoint: a folder or a hub id, in safetensors, or pickled as plain tensors."""

from __future__ import annotations

import functools
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.checkpoint import hub
from taut.checkpoint.errors import BadInput
from taut.checkpoint.refusals import MARKS, check_config, read_config, read_json
from taut.checkpoint.shards import Shard, TensorInfo, open_pickle, open_safetensors

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
TAUT_INDEX = "taut.safetensors.index.json"
INDEXES = {INDEX: open_safetensors, PICKLED_INDEX: open_pickle, TAUT_INDEX: open_safetensors}
RECORD = "taut.json"
UNRELATED_FOLDERS = {".git", ".cache", "__pycache__"}
WEIGHT_SUFFIXES = (".gguf", ".onnx", ".onnx_data", ".h5", ".msgpack", ".pt", ".pth", ".ckpt", ".ot", ".tflite")


@dataclass(frozen=True)
class Prior:
    """Traces of an earlier rewrite: the record of a taut run, and the marks of FlashNorm in the configuration."""

    record: dict[str, Any] | None
    marks: dict[str, Any]

    def __bool__(self) -> bool:
        return self.record is not None or bool(self.marks)


@dataclass(eq=False)
class Checkpoint:
    """A checkpoint on disk. `config` is config.json as it stands; no tensor is read before it is asked for."""

    path: Path
    config: dict[str, Any]
    shards: list[Shard]
    index: dict[str, Any] | None = None
    index_name: str = ""
    revision: str | None = None
    trust_remote_code: bool = False

    @functools.cached_property
    def tensors(self) -> dict[str, TensorInfo]:
        """Every tensor by its name on disk, in the order of the files and of their headers."""
        return {name: info for shard in self.shards for name, info in shard.tensors.items()}

    @functools.cached_property
    def _shard_of(self) -> dict[str, Shard]:
        return {name: shard for shard in self.shards for name in shard.tensors}

    @property
    def total_bytes(self) -> int:
        return sum(info.nbytes for info in self.tensors.values())

    def hf_config(self) -> Any:
        """The configuration as transformers reads it.

        Raises:
            BadInput: transformers cannot read it.
        """
        from transformers import AutoConfig

        try:
            return AutoConfig.from_pretrained(self.path, trust_remote_code=self.trust_remote_code)
        except Exception as error:
            first = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise BadInput(
                f"{self.path}: transformers cannot read config.json: {first}", "update transformers"
            ) from error

    def read(self, name: str, rows: slice | None = None) -> Tensor:
        """A tensor in its own dtype, or some of its rows (a slice along the first axis, step 1), read from disk now."""
        info = self.tensors[name]
        first, count, shape = 0, info.numel, info.shape
        if rows is not None and shape:
            start, stop, step = rows.indices(shape[0])
            if step != 1:
                raise ValueError(f"rows must be consecutive, not {rows}")
            each = info.numel // shape[0] if shape[0] else 0
            shape = (max(stop - start, 0), *shape[1:])
            first, count = start * each, shape[0] * each
        out = torch.empty(shape, dtype=info.dtype)
        if count:
            raw = out.flatten().view(torch.uint8).numpy()
            self.read_bytes(name, first * info.dtype.itemsize, raw)
        return out

    def read_bytes(self, name: str, start: int, buffer: np.ndarray) -> None:
        """Fill `buffer` (uint8) with a tensor's bytes from `start` on."""
        self._shard_of[name].read_bytes(name, start, buffer)

    @functools.cached_property
    def prior(self) -> Prior:
        """What earlier runs of taut, or of FlashNorm's own tools, left behind."""
        record = read_json(self.path / RECORD) if (self.path / RECORD).exists() else None
        return Prior(record, {mark: self.config[mark] for mark in MARKS if mark in self.config})

    def other_files(self) -> list[str]:
        """Files that are no weights, as paths within the folder, sorted; symlinks count as what they point to."""
        return [name for name in self._files if not self._is_weights(name)]

    def skipped_weights(self) -> list[str]:
        """Weights in other formats or beside the ones read; a rewritten checkpoint leaves them out."""
        used = {shard.name for shard in self.shards} | {self.index_name}
        return [name for name in self._files if self._is_weights(name) and name not in used]

    @functools.cached_property
    def _files(self) -> list[str]:
        return sorted(_walk(self.path))

    def _is_weights(self, name: str) -> bool:
        path = PurePosixPath(name)
        if path.parts[0] == "original" or path.suffix in WEIGHT_SUFFIXES:
            return True
        at_root = len(path.parts) == 1
        return at_root and (path.suffix in (".bin", ".safetensors") or name in INDEXES)


def open_checkpoint(
    model: str | Path, revision: str | None = None, trust_remote_code: bool = False, weights: bool = True
) -> Checkpoint:
    """Open a folder or a hub id; `weights=False` asks for no more than a configuration.

    Raises:
        BadInput: with the cause and the cure, for anything that is not a checkpoint taut can read.
    """
    folder = Path(model).expanduser()
    if not folder.exists():
        if isinstance(model, Path) or not hub.looks_like_hub_id(model):
            raise BadInput(f"{folder} does not exist", "give a checkpoint's folder or a hub id")
        folder = hub.fetch(model, revision, trust_remote_code, weights)
    elif revision is not None:
        raise BadInput(f"{folder} is a folder, which has no revisions", "leave --revision out, or give a hub id")
    config = read_config(folder)
    check_config(folder, config, trust_remote_code)
    shards, index, index_name = _open_weights(folder, required=weights)
    checkpoint = Checkpoint(folder, config, shards, index, index_name, revision, trust_remote_code)
    _check_float8(checkpoint)
    return checkpoint


def _open_weights(folder: Path, required: bool) -> tuple[list[Shard], dict[str, Any] | None, str]:
    """The files in the order in which transformers looks for them, and the index with its name."""
    for single, index in ((SINGLE, INDEX), (PICKLED, PICKLED_INDEX), ("", TAUT_INDEX)):
        if single and (folder / single).exists():
            return [INDEXES[index](folder / single, single)], None, ""
        if (folder / index).exists():
            return *_open_sharded(folder, index), index
    if required:
        raise BadInput(f"{folder} has no weights taut reads", f"it looks for {SINGLE}, {INDEX} and their .bin forms")
    return [], None, ""


def _open_sharded(folder: Path, index_name: str) -> tuple[list[Shard], dict[str, Any]]:
    path = folder / index_name
    index = read_json(path)
    weight_map = index.get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise BadInput(f"{path}: has no weight_map", "download the index again")
    shards = []
    for name in sorted({_file_name(path, value) for value in weight_map.values()}):
        if not (folder / name).exists():
            raise BadInput(f"{path}: names {name}, which is missing", "download the missing file")
        shards.append(INDEXES[index_name](folder / name, name))
    _check_names(path, weight_map, shards)
    return shards, index


def _file_name(index: Path, value: Any) -> str:
    """A file name that stays in the index's folder, whatever system reads it."""
    if not isinstance(value, str) or value in ("", ".", "..") or "\0" in value:
        raise BadInput(f"{index}: {value!r} is not a file name", "do not use this checkpoint")
    if PurePosixPath(value).name != value or PureWindowsPath(value).name != value:
        raise BadInput(f"{index}: {value!r} leaves the checkpoint's folder", "do not use this checkpoint")
    return value


def _check_names(index: Path, weight_map: dict[str, str], shards: list[Shard]) -> None:
    cure = "download the index and the files again, from one revision"
    found: dict[str, str] = {}
    for shard in shards:
        for name in shard.tensors:
            if name in found:
                raise BadInput(f"{index}: {name!r} is in both {found[name]} and {shard.name}", cure)
            found[name] = shard.name
    for name in sorted(weight_map.keys() | found.keys()):
        if weight_map.get(name) != found.get(name):
            said, held = weight_map.get(name, "no file"), found.get(name, "no file")
            raise BadInput(f"{index}: {name!r} should be in {said}, and {held} holds it", cure)


def _check_float8(checkpoint: Checkpoint) -> None:
    for name, info in checkpoint.tensors.items():
        if info.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
            cause = f"{checkpoint.path} is quantized (fp8, {name}): a folded gain would need its weights requantized"
            raise BadInput(cause, "give the checkpoint it was quantized from, and quantize again afterwards")


def _walk(root: Path) -> Iterator[str]:
    """Every regular file below a folder, through symlinks, each folder once."""
    seen: set[str] = set()
    for folder, below, names in os.walk(root, followlinks=True):
        below[:] = _fresh(Path(folder), below, seen)
        for name in names:
            path = Path(folder, name)
            if path.is_symlink() and not path.exists():
                raise BadInput(f"{path}: a symlink to a file that is missing", "download the missing file")
            if path.is_file():
                yield path.relative_to(root).as_posix()


def _fresh(folder: Path, names: Iterable[str], seen: set[str]) -> list[str]:
    seen.add(os.path.realpath(folder))
    wanted = [name for name in sorted(names) if name not in UNRELATED_FOLDERS]
    return [name for name in wanted if os.path.realpath(folder / name) not in seen]
