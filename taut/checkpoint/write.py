"""Write a checkpoint back: the stock form, which keeps the layout it came in, and the taut form."""

from __future__ import annotations

import itertools
import json
import shutil
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from taut.checkpoint import atomic
from taut.checkpoint.edits import Edit
from taut.checkpoint.errors import BadInput, OutOfRange
from taut.checkpoint.read import INDEX, RECORD, TAUT_INDEX, Checkpoint
from taut.checkpoint.shards import CODES, TensorInfo
from taut.checkpoint.stream import Block, Findings, Streamer, blocks

Progress = Callable[[int, int], None]
"""Hears of the bytes written so far and of all that will be."""
LARGEST_SHARD = 5_000_000_000


@dataclass(frozen=True)
class NewShard:
    """A safetensors file to be written: its first bytes, and where each tensor goes."""

    name: str
    header: bytes
    tensors: dict[str, TensorInfo]


def write_checkpoint(
    source: Checkpoint,
    out: Path,
    edits: Mapping[str, Edit],
    *,
    record: Mapping[str, Any],
    extra_tensors: Mapping[str, Edit] | None = None,
    config_changes: Mapping[str, Any] | None = None,
    may_be_nonfinite: Collection[str] = (),
    force: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> None:
    """Write `source` to `out` in stock form, with the tensors in `edits` (by their names on disk) changed.

    The files, their headers and the order of their tensors stay; only `extra_tensors` are appended to the last file.
    A pickled checkpoint comes back as safetensors of the same split. `record` becomes taut.json.

    Raises:
        BadInput: the target is refused, the disk fills up, or a tensor holds NaN or infinities (except those that
            `may_be_nonfinite`, because no parameter reads them).
        OutOfRange: edited values leave their dtype's normal range.
    """
    unknown = sorted(set(edits) - set(source.tensors))
    if unknown:
        raise ValueError(f"no tensor of {source.path}: {', '.join(unknown)}")
    shards = _stock_layout(source, edits, extra_tensors or {})
    texts = {"config.json": _config(source, config_changes or {}), RECORD: _json(record)}
    if source.index is not None:
        texts[INDEX] = _new_index(source, shards)
    _write(source, out, shards, {**edits, **(extra_tensors or {})}, texts, may_be_nonfinite, force, progress, verify)


def write_taut(
    source: Checkpoint,
    out: Path,
    tensors: Mapping[str, Edit],
    *,
    record: Mapping[str, Any],
    force: bool = False,
    progress: Progress | None = None,
    verify: bool = True,
) -> None:
    """Write the taut form: `tensors`, as given, in files of at most 5 GB, beside the original configuration and files.

    Raises: as `write_checkpoint`.
    """
    groups = _split(tensors)
    names = [f"taut-{i:05}-of-{len(groups):05}.safetensors" for i in range(1, len(groups) + 1)]
    shards = [new_shard(name, group, {"format": "pt"}) for name, group in zip(names, groups, strict=True)]
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": _weight_map(shards)}
    texts = {"config.json": _config(source, {}), RECORD: _json(record), TAUT_INDEX: _json(index)}
    _write(source, out, shards, tensors, texts, (), force, progress, verify)


def new_shard(name: str, tensors: Mapping[str, Any], metadata: Mapping[str, str] | None) -> NewShard:
    """Lay tensors (anything with a dtype and a shape) out in a file: in the order given, or the wider dtypes first
    where some would start at no multiple of their size."""
    spans = _spans(tensors)
    if any(start % tensors[key].dtype.itemsize for key, (start, _) in spans.items()):
        tensors = dict(sorted(tensors.items(), key=lambda item: -item[1].dtype.itemsize))
        spans = _spans(tensors)
    fields: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for key, tensor in tensors.items():
        fields[key] = {"dtype": CODES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": list(spans[key])}
    text = json.dumps(fields, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    header = len(text).to_bytes(8, "little") + text
    infos = {
        key: TensorInfo(tensor.dtype, tuple(tensor.shape), name, len(header) + spans[key][0], _nbytes(tensor))
        for key, tensor in tensors.items()
    }
    return NewShard(name, header, infos)


def _spans(tensors: Mapping[str, Any]) -> dict[str, tuple[int, int]]:
    ends = list(itertools.accumulate(_nbytes(tensor) for tensor in tensors.values()))
    return dict(zip(tensors, zip([0, *ends[:-1]], ends, strict=True), strict=True))


def _nbytes(tensor: Any) -> int:
    return torch.Size(tensor.shape).numel() * tensor.dtype.itemsize


def _stock_layout(source: Checkpoint, edits: Mapping[str, Edit], extra: Mapping[str, Edit]) -> list[NewShard]:
    shards = []
    for shard in source.shards:
        changed = {key: edits.get(key, info) for key, info in shard.tensors.items()}
        name, added = _safetensors_name(shard.name), extra if shard is source.shards[-1] else {}
        same = all(_alike(changed[key], info) for key, info in shard.tensors.items())
        if shard.header is not None and same and not added:
            shards.append(NewShard(name, shard.header, dict(shard.tensors)))
            continue
        in_order = dict(sorted(changed.items(), key=lambda item: shard.tensors[item[0]].offset))
        shards.append(new_shard(name, {**in_order, **added}, shard.metadata or {"format": "pt"}))
    return shards


def _alike(edit: Any, info: TensorInfo) -> bool:
    return edit.dtype == info.dtype and tuple(edit.shape) == info.shape


def _safetensors_name(name: str) -> str:
    if name.endswith(".safetensors"):
        return name
    return name.replace("pytorch_model", "model", 1).removesuffix(".bin") + ".safetensors"


def _new_index(source: Checkpoint, shards: list[NewShard]) -> bytes:
    """The source's index; only what changed is replaced."""
    old = dict(source.index or {})
    weight_map = _weight_map(shards)
    new = [info for shard in shards for info in shard.tensors.values()]
    if weight_map == old.get("weight_map") and sum(info.nbytes for info in new) == source.total_bytes:
        return (source.path / source.index_name).read_bytes()
    metadata = dict(old.get("metadata") or {})
    metadata["total_size"] = metadata.get("total_size", source.total_bytes)
    metadata["total_size"] += sum(info.nbytes for info in new) - source.total_bytes
    if "total_parameters" in metadata:
        metadata["total_parameters"] += sum(i.numel for i in new) - sum(i.numel for i in source.tensors.values())
    return _json({**old, "metadata": metadata, "weight_map": weight_map})


def _weight_map(shards: list[NewShard]) -> dict[str, str]:
    return {name: shard.name for shard in shards for name in shard.tensors}


def _split(tensors: Mapping[str, Edit]) -> list[dict[str, Edit]]:
    groups: list[dict[str, Edit]] = [{}]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _nbytes(tensor) > LARGEST_SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = tensor
        size += _nbytes(tensor)
    return groups


def _json(value: Mapping[str, Any]) -> bytes:
    return (json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()


def _config(source: Checkpoint, changes: Mapping[str, Any]) -> bytes:
    if not changes:
        return (source.path / "config.json").read_bytes()
    return (json.dumps({**source.config, **changes}, indent=2, ensure_ascii=False) + "\n").encode()


def _write(
    source: Checkpoint,
    out: Path,
    shards: list[NewShard],
    edits: Mapping[str, Edit],
    texts: Mapping[str, bytes],
    may_be_nonfinite: Collection[str],
    force: bool,
    progress: Progress | None,
    verify: bool,
) -> None:
    others = [name for name in source.other_files() if name not in texts]
    total = sum(info.nbytes for shard in shards for info in shard.tensors.values())
    rest = sum((source.path / name).stat().st_size for name in others)
    rest += sum(len(text) for text in (*texts.values(), *(shard.header for shard in shards)))
    atomic.check_target(source.path, Path(out), total + rest, force)
    with atomic.folder(Path(out)) as building:
        for name in others:
            (building / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(source.path / name, building / name)
        for name, text in texts.items():
            (building / name).write_bytes(text)
        for shard in shards:
            (building / shard.name).write_bytes(shard.header)
        report = None if progress is None else lambda done: progress(done, total)
        findings = Streamer(source, verify).run(_all_blocks(shards, edits, building), report)
        _judge(source, shards, findings, set(may_be_nonfinite) - set(edits))


def _all_blocks(shards: list[NewShard], edits: Mapping[str, Edit], folder: Path) -> Iterator[Block]:
    for shard in shards:
        for name, info in shard.tensors.items():
            yield from blocks(name, info, edits.get(name), folder / shard.name)


def _judge(source: Checkpoint, shards: list[NewShard], findings: Findings, may_be_nonfinite: Collection[str]) -> None:
    bad = {name: count for name, count in findings.nonfinite.items() if name not in may_be_nonfinite}
    if bad:
        named = ", ".join(f"{name} ({count})" for name, count in sorted(bad.items()))
        cause = f"{source.path}: infinite or not-a-number values in {named}"
        raise BadInput(cause, "repair or download the checkpoint again")
    dtypes = {name: info.dtype for shard in shards for name, info in shard.tensors.items()}
    reasons = findings.out_of_range(dtypes.__getitem__)
    if reasons:
        raise OutOfRange(reasons)
