"""A checkpoint, and what `taut apply` made of it."""

from __future__ import annotations

from pathlib import Path

import architectures
import pytest
from cli.commands import as_json


@pytest.fixture(scope="session")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    architectures.build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def rewritten(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rewritten") / "new"
    found = as_json("apply", model, "--out", out, "--threads", 1)
    assert found["out"] == str(out)
    assert {"rewrite": "fold_norm", "where": "model.layers.0.input_layernorm"} in found["applied"]
    assert [r["where"] for r in found["refused"] if r["rewrite"] == "fold_norm"] == ["model.norm"]
    assert all(r["reason"] for r in found["refused"])
    assert found["evidence"]["passed"] is True
    return out
