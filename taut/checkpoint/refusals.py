"""Checkpoints that are refused for what their folder and configuration say, before any weight is read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from taut.checkpoint.errors import BadInput

MARKS = ("flash_norm", "flashnorm_folded")
QUANTIZED_FILES = ("quantize_config.json", "quant_config.json", "hf_quant_config.json")


def read_json(path: Path) -> dict[str, Any]:
    """A file's JSON object.

    Raises:
        BadInput: missing, not readable, or not a JSON object.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BadInput(f"{path}: cannot be read ({error.strerror})", "check its path and permissions") from None
    except (ValueError, RecursionError) as error:
        raise BadInput(f"{path}: not valid JSON ({error})", "download or repair the file") from None
    if not isinstance(value, dict):
        raise BadInput(f"{path}: not a JSON object", "download or repair the file")
    return value


def read_config(folder: Path) -> dict[str, Any]:
    """The folder's config.json, after the refusals that need no more than the folder.

    Raises:
        BadInput: no checkpoint here, or one that taut cannot rewrite.
    """
    if not folder.is_dir():
        raise BadInput(f"{folder} is not a folder", "give a checkpoint's folder or a hub id")
    if not any(folder.iterdir()):
        raise BadInput(f"{folder} is empty", "give a checkpoint's folder or a hub id")
    if (folder / "adapter_config.json").exists():
        cure = "merge it into its base model first (peft: merge_and_unload), then give the merged checkpoint"
        raise BadInput(f"{folder} holds an adapter (adapter_config.json), which only fits its own base model", cure)
    if not (folder / "config.json").exists():
        raise BadInput(f"{folder} has no config.json", "give the folder of a transformers checkpoint")
    return read_json(folder / "config.json")


def check_config(folder: Path, config: dict[str, Any], trust_remote_code: bool) -> None:
    """Refuse quantized weights, and code that is not trusted.

    Raises:
        BadInput: with the reason.
    """
    method = quantization(config)
    if method is None and any((folder / name).exists() for name in QUANTIZED_FILES):
        method = "a quantization_config file beside the weights"
    if method is not None:
        cause = f"{folder} is quantized ({method}): a folded gain would need its weights requantized"
        raise BadInput(cause, "give the checkpoint it was quantized from, and quantize again afterwards")
    if config.get("auto_map") and not trust_remote_code and not _is_native(config):
        cause = f"{folder} comes with code of its own (auto_map), which would be run"
        raise BadInput(cause, "read that code, then pass --trust-remote-code")


def quantization(config: Any) -> str | None:
    """The quantization method that a configuration, or one within it, names."""
    if not isinstance(config, dict):
        return None
    for key in ("quantization_config", "compression_config"):
        if config.get(key):
            settings = config[key]
            return str(settings.get("quant_method", key)) if isinstance(settings, dict) else key
    return next(filter(None, (quantization(value) for value in config.values())), None)


def _is_native(config: dict[str, Any]) -> bool:
    """Whether transformers has this architecture itself; it then leaves the checkpoint's code alone."""
    from transformers import CONFIG_MAPPING

    return config.get("model_type") in CONFIG_MAPPING
