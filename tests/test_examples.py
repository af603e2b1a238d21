"""The examples run as a user would run them, and say what they should."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

EXAMPLES = Path(__file__).parent.parent / "examples"


def run(name: str, *arguments: object) -> str:
    command = [sys.executable, EXAMPLES / name, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_fold_and_publish(tmp_path):
    said = run("fold_and_publish.py", "--out", tmp_path / "new", "--repo", "me/mine")
    assert "12 norms folded" in said
    assert "the same model: True" in said
    assert f"hf upload me/mine {tmp_path / 'new'} ." in said
    assert (tmp_path / "new" / "model.safetensors").exists()


def test_compare_rewrites():
    heading, fold, merge = run("compare_rewrites.py").splitlines()
    assert "bytes saved" in heading
    assert fold.split()[:2] == ["fold_norm", f"{2 * 12 * 192:,}"]
    assert merge.split()[0] == "merge_linears"
    assert float(merge.split()[-2]) < 1e-12
    assert float(merge.split()[-1]) < 2


def test_generate():
    """The same text as transformers' greedy continuation; bf16 rounds otherwise, so float32 weights."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from taut.demonstrate import MODEL, PROMPT

    tokenizer = AutoTokenizer.from_pretrained(MODEL)
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    ids = tokenizer(PROMPT, return_tensors="pt").input_ids
    with torch.no_grad():
        expected = model.generate(ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
    said = run("generate.py", "--tokens", 12, "--weights", "fp32")
    assert tokenizer.decode(expected) in said
    assert "12 tokens" in said


@pytest.mark.parametrize("name", sorted(path.name for path in EXAMPLES.glob("*.py")))
def test_every_example_explains_itself(name):
    assert "usage" in run(name, "--help")
