"""How fast a checkpoint is rewritten, against `cp`, and in how much memory.

    python benchmarks/streaming.py FOLDER [--layers 32] [--rounds 2]

makes an 8B-shaped Llama checkpoint in bfloat16 (16 GB, random weights) in FOLDER, then alternates between copying it
with `cp --reflink=never` and rewriting it as `fold_norm` would (q, k, v, gate and up of every layer scaled, every gain
filled), each from a cold cache and timed until the data is on the disk. What it made is deleted. Prints one JSON object
and keeps it in benchmarks/results/streaming.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path

HIDDEN, MLP, KV, VOCAB, SHARD = 4096, 14336, 1024, 128256, 5_000_000_000
READS_ATTENTION, READS_MLP = ("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj")
RESULT = Path(__file__).parent / "results" / "streaming.json"


def shapes(layers: int) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (VOCAB, HIDDEN)}
    for i in range(layers):
        layer = f"model.layers.{i}"
        attention = {
            "q_proj": (HIDDEN, HIDDEN),
            "k_proj": (KV, HIDDEN),
            "v_proj": (KV, HIDDEN),
            "o_proj": (HIDDEN, HIDDEN),
        }
        mlp = {"gate_proj": (MLP, HIDDEN), "up_proj": (MLP, HIDDEN), "down_proj": (HIDDEN, MLP)}
        found |= {f"{layer}.self_attn.{name}.weight": shape for name, shape in attention.items()}
        found |= {f"{layer}.mlp.{name}.weight": shape for name, shape in mlp.items()}
        found |= {f"{layer}.{name}.weight": (HIDDEN,) for name in ("input_layernorm", "post_attention_layernorm")}
    return found | {"model.norm.weight": (HIDDEN,), "lm_head.weight": (VOCAB, HIDDEN)}


def make(folder: Path, layers: int) -> None:
    """A sharded checkpoint of random weights between 2^-9 and 2^-7 in magnitude."""
    import numpy as np
    import torch

    from taut.checkpoint.shards import TensorInfo
    from taut.checkpoint.write import new_shard

    groups: list[dict[str, TensorInfo]] = [{}]
    size = 0
    for name, shape in shapes(layers).items():
        info = TensorInfo(torch.bfloat16, shape, "", 0, 2 * torch.Size(shape).numel())
        if size + info.nbytes > SHARD:
            groups.append({})
            size = 0
        groups[-1][name] = info
        size += info.nbytes
    folder.mkdir(parents=True)
    rng, weight_map = np.random.Generator(np.random.SFC64(0)), {}
    for i, group in enumerate(groups, 1):
        shard = new_shard(f"model-{i:05}-of-{len(groups):05}.safetensors", group, {"format": "pt"})
        weight_map |= dict.fromkeys(group, shard.name)
        with open(folder / shard.name, "wb") as file:
            file.write(shard.header)
            for info in group.values():
                for start in range(0, info.nbytes, 1 << 24):
                    count = min(1 << 24, info.nbytes - start)
                    words = rng.integers(0, 1 << 64, count // 8, dtype=np.uint64)
                    file.write((words & np.uint64(0x81FF81FF81FF81FF)) | np.uint64(0x3B003B003B003B00))
    total = sum(info.nbytes for group in groups for info in group.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    (folder / "config.json").write_text(json.dumps({"model_type": "llama", "architectures": ["LlamaForCausalLM"]}))
    sync(folder)


def sync(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        with open(path, "rb+") as file:
            os.fsync(file.fileno())


def forget(folder: Path) -> None:
    """Drop a folder's files from the page cache."""
    for path in folder.iterdir():
        with open(path, "rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    with contextlib.suppress(OSError):
        Path("/proc/sys/vm/drop_caches").write_text("3")


def copy(source: Path, out: Path) -> dict[str, float]:
    start, before = time.perf_counter(), resource.getrusage(resource.RUSAGE_CHILDREN)
    subprocess.run(["cp", "--reflink=never", "-r", source, out], check=True)
    sync(out)
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return {"seconds": time.perf_counter() - start, "cpu_seconds": cpu}


def rewrite(source: Path, out: Path) -> dict[str, float]:
    """The rewrite, in this process: seconds, and the highest resident memory in GB."""
    import torch

    from taut.checkpoint import Edit, Fill, Scale, open_checkpoint, write_checkpoint

    generator = torch.Generator().manual_seed(0)
    start = time.perf_counter()
    checkpoint = open_checkpoint(source)
    edits: dict[str, Edit] = {}
    for name, info in checkpoint.tensors.items():
        if name.split(".")[-2] in (*READS_ATTENTION, *READS_MLP):
            gain = 0.5 + torch.rand(HIDDEN, dtype=torch.float64, generator=generator)
            edits[name] = Scale(name, info, 1, gain)
        elif len(info.shape) == 1:
            edits[name] = Fill(info.shape, info.dtype, 1.0)
    write_checkpoint(checkpoint, out, edits, record={"format": 1})
    seconds = time.perf_counter() - start
    status = Path("/proc/self/status").read_text()
    peak = int(next(line for line in status.splitlines() if line.startswith("VmHWM")).split()[1])
    return {"seconds": seconds, "cpu_seconds": time.process_time(), "peak_gb": peak * 1024 / 1e9}


def rewrite_apart(source: Path, out: Path) -> dict[str, float]:
    command = [sys.executable, __file__, str(out.parent), "--rewrite", str(source), str(out)]
    return json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)


def compare(folder: Path, layers: int, rounds: int) -> dict[str, object]:
    source, out = folder / "synthetic", folder / "rewritten"
    try:
        make(source, layers)
        size = sum(path.stat().st_size for path in source.iterdir())
        runs: dict[str, list[dict[str, float]]] = {"cp": [], "taut": []}
        for _ in range(rounds):
            for name, work in (("cp", copy), ("taut", rewrite_apart)):
                forget(source)
                runs[name].append(work(source, out))
                print(name, runs[name][-1], file=sys.stderr, flush=True)
                shutil.rmtree(out)
    finally:
        shutil.rmtree(source, ignore_errors=True)
        shutil.rmtree(out, ignore_errors=True)
    best = {name: min(run["seconds"] for run in found) for name, found in runs.items()}
    return {
        "bytes": size,
        "cores": os.cpu_count(),
        "cp_gb_per_s": size / best["cp"] / 1e9,
        "machine": platform.platform(),
        "peak_gb": max(run["peak_gb"] for run in runs["taut"]),
        "ratio": best["cp"] / best["taut"],
        "runs": runs,
        "taut_gb_per_s": size / best["taut"] / 1e9,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="a folder on the disk to be measured, with 33 GB free")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--rewrite", nargs=2, type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.rewrite:
        print(json.dumps(rewrite(*arguments.rewrite)))
        return
    result = compare(arguments.folder, arguments.layers, arguments.rounds)
    RESULT.parent.mkdir(exist_ok=True)
    RESULT.write_text(json.dumps(result, indent=2, sort_keys=True) + "\n")
    print(json.dumps(result, indent=2, sort_keys=True))


if __name__ == "__main__":
    main()
