"""Small checkpoints, written by safetensors' and torch's own writers."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 16,
    "hidden_size": 8,
    "intermediate_size": 12,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 4,
    "tie_word_embeddings": False,
}


def tensors(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (7, 5), "b.weight": (3, 4, 5), "gain": (5,), "big.weight": (64, 33)}
    made = {name: torch.randn(shape, generator=generator).to(dtype) for name, shape in shapes.items()}
    return made | {"ids": torch.arange(6), "flag": torch.tensor([True, False]), "scalar": torch.tensor(2.5).to(dtype)}


def config(folder: Path, **changes) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG | changes, indent=2))


def single(folder: Path, values: dict[str, Tensor] | None = None) -> Path:
    config(folder)
    save_file(values or tensors(), folder / "model.safetensors", metadata={"format": "pt", "note": "kept"})
    return folder


def sharded(folder: Path, values: dict[str, Tensor] | None = None) -> Path:
    config(folder)
    values = values or tensors()
    names = sorted(values)
    halves = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    for file, held in halves.items():
        save_file({name: values[name] for name in held}, folder / file, metadata={"format": "pt"})
    total = sum(value.numel() * value.element_size() for value in values.values())
    weight_map = {name: file for file, held in halves.items() for name in held}
    index = {"metadata": {"total_size": total, "total_parameters": 100}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1))
    return folder


def pickled(folder: Path, values: dict[str, Tensor] | None = None) -> Path:
    config(folder)
    torch.save(values or tensors(), folder / "pytorch_model.bin")
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below a folder, hidden ones too."""
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
