from types import SimpleNamespace

import huggingface_hub
import pytest
from checkpoint.made import pickled, single
from huggingface_hub import errors

from taut.checkpoint import BadInput, open_checkpoint
from taut.checkpoint.hub import looks_like_hub_id


def response(status: int) -> SimpleNamespace:
    return SimpleNamespace(status_code=status, headers={}, request=None)


def with_cause(error: Exception, cause: Exception) -> Exception:
    error.__cause__ = cause
    return error


FAILURES = {
    "gated": (errors.GatedRepoError("no", response=response(403)), "is gated", "ask for access"),
    "not found": (errors.RepositoryNotFoundError("no", response=response(404)), "neither a folder", "spelling"),
    "no revision": (errors.RevisionNotFoundError("no", response=response(404)), "no revision 'v1'", "branch"),
    "unauthorised": (errors.HfHubHTTPError("no", response=response(401)), "refused", "hf auth login"),
    "server": (errors.HfHubHTTPError("no", response=response(500)), "failed", "later"),
    "offline": (errors.OfflineModeIsEnabled("no"), "cannot be reached", "online"),
    "not cached": (errors.LocalEntryNotFoundError("no"), "cannot be reached", "online"),
    "no network": (with_cause(errors.LocalEntryNotFoundError("no"), ConnectionError()), "cannot be reached", "online"),
    "gated, wrapped": (
        with_cause(errors.LocalEntryNotFoundError("no"), errors.GatedRepoError("no", response=response(403))),
        "is gated",
        "ask for access",
    ),
}


@pytest.mark.parametrize(("failure", "cause", "cure"), FAILURES.values(), ids=FAILURES)
def test_failures_are_told_apart(monkeypatch, failure, cause, cure):
    def fail(*args, **options):
        raise failure

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(BadInput) as caught:
        open_checkpoint("someone/some-model", revision="v1")
    assert "someone/some-model" in str(caught.value)
    assert cause in str(caught.value)
    assert cure in caught.value.cure


def test_other_errors_are_not_swallowed(monkeypatch):
    def fail(*args, **options):
        raise ZeroDivisionError

    monkeypatch.setattr(huggingface_hub, "snapshot_download", fail)
    with pytest.raises(ZeroDivisionError):
        open_checkpoint("someone/some-model")


def test_asks_for_safe_files_only_and_for_pickles_only_where_there_is_nothing_else(monkeypatch, tmp_path):
    asked = []

    def download(model, *, revision, allow_patterns, ignore_patterns):
        asked.append((model, revision, allow_patterns, ignore_patterns))
        return str(folder)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    folder = single(tmp_path / "safe")
    open_checkpoint("someone/safe", revision="v2")
    assert len(asked) == 1
    assert asked[0][:3] == ("someone/safe", "v2", None)
    assert {"*.bin", "*.py", "*.gguf"} <= set(asked[0][3])
    folder = pickled(tmp_path / "old")
    open_checkpoint("someone/old", trust_remote_code=True)
    assert "*.py" not in asked[1][3]
    assert all(pattern.startswith("pytorch_model") for pattern in asked[2][2])


@pytest.mark.parametrize("text", ["./m", "/abs/m", "a/b/c", "../m", "~/m", "a b", ""])
def test_what_is_no_hub_id(text):
    assert not looks_like_hub_id(text)
