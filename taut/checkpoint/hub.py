"""Fetch a checkpoint from the model hub, and say what went wrong when that fails."""

from __future__ import annotations

import re
from pathlib import Path

from taut.checkpoint.errors import BadInput

OTHER_FORMATS = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.h5", "*.msgpack", "*.gguf", "*.onnx", "*.onnx_data", "*.ot")
PICKLES = ("pytorch_model*.bin", "pytorch_model.bin.index.json")


def looks_like_hub_id(model: str) -> bool:
    return re.fullmatch(r"[\w][\w.-]*(/[\w][\w.-]*)?", model) is not None


def fetch(model: str, revision: str | None, trust_remote_code: bool, weights: bool) -> Path:
    """The folder of a hub model's snapshot: safetensors, else pickled weights; code only where it is trusted.

    Raises:
        BadInput: offline, not found, gated or unauthorised; each with its own cure.
    """
    unwanted = [*OTHER_FORMATS, "original/*"] + ([] if trust_remote_code else ["*.py"])
    if not weights:
        unwanted.append("*.safetensors")
    folder = _snapshot(model, revision, None, unwanted)
    if weights and not any(folder.glob("*.safetensors")):
        folder = _snapshot(model, revision, list(PICKLES), None)
    return folder


def _snapshot(model: str, revision: str | None, wanted: list[str] | None, unwanted: list[str] | None) -> Path:
    import huggingface_hub

    try:
        return Path(
            huggingface_hub.snapshot_download(model, revision=revision, allow_patterns=wanted, ignore_patterns=unwanted)
        )
    except Exception as error:
        reason = explain(model, revision, error)
        if reason is None:
            raise
        raise reason from error


def explain(model: str, revision: str | None, error: BaseException) -> BadInput | None:
    """What a failed download means, or None where it is not the hub's doing."""
    from huggingface_hub import errors

    for cause in _causes(error):
        status = getattr(getattr(cause, "response", None), "status_code", None)
        if isinstance(cause, errors.GatedRepoError):
            return BadInput(
                f"{model} is gated", f"ask for access at https://huggingface.co/{model}, then `hf auth login`"
            )
        if isinstance(cause, errors.RevisionNotFoundError):
            return BadInput(f"{model} has no revision {revision!r}", "name a branch, a tag or a commit that it has")
        if isinstance(cause, errors.RepositoryNotFoundError):
            cure = "check the spelling; if it is private, `hf auth login`; a folder's path may begin with ./"
            return BadInput(f"{model} is neither a folder here nor a model on the hub", cure)
        if isinstance(cause, errors.HfHubHTTPError) and status in (401, 403):
            return BadInput(f"the hub refused {model} ({status})", "`hf auth login` with a token that may read it")
    for cause in _causes(error):
        if isinstance(
            cause, errors.OfflineModeIsEnabled | errors.LocalEntryNotFoundError | ConnectionError | TimeoutError
        ):
            cure = "go online, unset HF_HUB_OFFLINE, or give a folder"
            return BadInput(f"{model} is not in the local cache and the hub cannot be reached", cure)
        if isinstance(cause, errors.HFValidationError):
            return BadInput(f"{model!r} is neither a folder here nor a hub id", "check the spelling")
        if isinstance(cause, errors.HfHubHTTPError):
            return BadInput(f"the hub failed on {model}: {cause}", "try again later")
    return None


def _causes(error: BaseException | None):
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or error.__context__
