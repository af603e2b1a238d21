"""`taut inspect`: what it finds, and that it needs no weights."""

from __future__ import annotations

import shutil
from pathlib import Path

import architectures
from cli.commands import as_json, refused, run

import taut


def test_inspect(model):
    found = as_json("inspect", model)
    folds = {site["where"]: site["refused"] for site in found["sites"] if site["rewrite"] == "fold_norm"}
    assert len(folds) == 5
    assert [where for where, refused in folds.items() if refused] == ["model.norm"]
    assert "output" in folds["model.norm"]
    assert (found["idle_parameters"], found["idle_bytes"]) == (4 * 48, 4 * 48 * 4)
    assert as_json("inspect", model, "--dtype", "bfloat16")["idle_bytes"] == 4 * 48 * 2


def test_inspect_for_people(model, monkeypatch):
    monkeypatch.setattr("taut.machine.measured", lambda: None)
    printed = run("inspect", model, "--graph", "--facts").stdout
    assert "4 of 5 norms can be folded" in printed
    assert "model.layers.{0..1}.input_layernorm" in printed
    assert "it is an output of the model" in printed
    assert "rms_norm(" in printed
    summary = run("inspect", model).stdout
    assert len(summary.splitlines()) < 25
    assert max(map(len, summary.splitlines())) <= 80
    assert "q_proj+k_proj+v_proj" not in summary
    assert "No place for" in summary
    assert "fuse_glu" not in summary  # is for a step, which nobody asked for
    assert "q_proj+k_proj+v_proj" in run("inspect", model, "--all").stdout


def test_inspect_needs_no_weights(model, tmp_path):
    shutil.copy(model / "config.json", tmp_path)
    assert as_json("inspect", tmp_path)["sites"] == as_json("inspect", model)["sites"]
    assert as_json("plan", tmp_path) == as_json("plan", model)


def test_a_report_per_norm(model):
    found = as_json("inspect", model, "--norms")["norms"]
    assert [norm["verdict"] for norm in found] == ["free"] * 4 + ["can be made free"]
    assert found[-1]["needs"] == ["--outputs logits"]
    assert found[0]["removed"] == {"gain": "fold_norm", "division": "defer_norm"}
    printed = run("inspect", model, "--norms").stdout
    assert "can be made free" in printed
    assert "--outputs logits" in printed
    assert "norms" not in as_json("inspect", model)


def test_a_report_per_norm_of_a_model_whose_head_is_tied(tmp_path):
    """Untied, a parameter of its own is judged that no tensor on disk holds."""
    architectures.build("gpt2").save_pretrained(tmp_path / "gpt2")
    found = as_json("inspect", tmp_path / "gpt2", "--norms")["norms"]
    assert [norm["verdict"] for norm in found] == ["can be made free"] * 4 + ["never free"]
    assert found[0]["needs"] == ["--untie"]


def test_redundant_parameters(tmp_path):
    architectures.build("gpt2").save_pretrained(tmp_path / "gpt2")
    found = {layer["name"]: layer for layer in as_json("inspect", tmp_path / "gpt2", "--redundancy")["redundancy"]}
    reader = found["transformer.h.0.attn.c_attn"]
    assert reader["redundant_parameters"] == reader["outputs"] > 0
    assert found["transformer.h.0.mlp.c_proj"]["redundant_parameters"] == 0
    printed = run("inspect", tmp_path / "gpt2", "--redundancy").stdout
    assert "attn.c_attn" in printed
    assert "mlp.c_proj" not in printed.partition("redundancy")[2]


def test_redundancy_on_a_text():
    demo = Path(taut.__file__).parent / "demo"
    found = as_json("inspect", demo / "model", "--redundancy", "--text", demo / "heldout.txt")["redundancy"]
    assert len(found) == 6 * 7 + 1


def test_redundancy_refuses(model, tmp_path):
    (tmp_path / "short.txt").write_text("short")
    refused(tmp_path, "--redundancy", "inspect", model, "--text", tmp_path / "short.txt")
    demo = Path(taut.__file__).parent / "demo" / "model"
    refused(tmp_path, "cannot be read", "inspect", demo, "--redundancy", "--text", tmp_path / "none.txt")
    refused(tmp_path, "a row takes", "inspect", demo, "--redundancy", "--text", tmp_path / "short.txt")
    (tmp_path / "few.txt").write_text("def f(x):\n    return x\n" * 30)
    refused(tmp_path, "more data", "inspect", demo, "--redundancy", "--text", tmp_path / "few.txt")
