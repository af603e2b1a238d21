"""`taut generate`: streams text, ends with one line, falls back aloud; its second start imports no model code."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import transformers
from typer.testing import CliRunner

import taut
from taut import generation
from taut.checkpoint import BadInput
from taut.cli import app
from taut.ops._numba.compressed import LOOKS_UP
from taut.shrink import tiny_model

DEMO = Path(taut.__file__).parent / "demo" / "model"
PROMPT = "The king"


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


def run(*args: str):
    return CliRunner().invoke(app, ["generate", *args])


def test_text_is_that_of_transformers():
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype="float32").eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(DEMO)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**prompt, max_new_tokens=40, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    expected = tokenizer.decode(whole, skip_special_tokens=True)
    assert "".join(taut.generate(DEMO, PROMPT, max_new_tokens=40, weights="fp32")) == expected


def test_it_streams_and_ends_with_one_line():
    done = run(str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "3")
    assert done.exit_code == 0
    last = done.stdout.rstrip().splitlines()[-1]
    assert "tokens/s" in last
    assert "GB/s" in last
    assert "slack not known: run `taut machines --measure` once" in last
    again = run(str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "20", "--temperature", "0.8", "--seed", "3")
    assert again.stdout.splitlines()[:-1] == done.stdout.splitlines()[:-1]


@pytest.mark.skipif(not LOOKS_UP, reason="COMPRESSED WEIGHTS NOT TESTED: no instruction looks up bytes")
def test_compressed_weights_are_told(monkeypatch):
    given = str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "5", "--weights", "bf16"
    before = run(*given).stdout.splitlines()
    monkeypatch.setattr("taut.runtime.placed.LARGE", 0)
    after = run(*given).stdout.splitlines()
    assert after[:-1] == before[:-1]
    assert "compressed" not in before[-1]
    assert "GB/s of weights compressed to " in after[-1]


def test_json_is_one_object():
    done = run(str(DEMO), "--prompt", PROMPT, "--max-new-tokens", "5", "--json")
    record = json.loads(done.stdout)
    assert record["tokens"] == 5
    assert record["ended"] == "length"
    assert record["bytes"] > 4 * (DEMO / "model.safetensors").stat().st_size * 0.7


@pytest.mark.parametrize(
    ("args", "cause"),
    [
        (("--prompt", ""), "the prompt is empty"),
        (("--prompt", "\udcff"), "the prompt is no text"),
        (("--prompt", PROMPT, "--max-length", "5000"), "1024 positions"),
        (("--prompt", "king " * 50, "--max-length", "8"), "window of 8"),
        (("--prompt", PROMPT, "--chat"), "no chat template"),
    ],
)
def test_bad_input_has_a_cause_and_a_cure(args, cause):
    done = run(str(DEMO), *args)
    assert done.exit_code == 2
    assert cause in done.stderr
    assert "cure" in done.stderr


def test_an_interrupt_ends_cleanly_and_still_says_what_it_took(monkeypatch):
    stream = generation.pieces

    def interrupted(tokens, tokenizer):
        for count, piece in enumerate(stream(tokens, tokenizer)):
            if count == 3:
                raise KeyboardInterrupt
            yield piece

    monkeypatch.setattr(generation, "pieces", interrupted)
    done = run(str(DEMO), "--prompt", PROMPT)
    assert done.exit_code == 130
    assert "tokens/s" in done.stdout.splitlines()[-1]


@pytest.fixture(scope="module")
def refused(tmp_path_factory) -> Path:
    """A checkpoint whose step cannot be compiled, with a tokenizer."""
    folder = tmp_path_factory.mktemp("refused")
    model: Any = tiny_model(transformers.MambaForCausalLM)
    model.resize_token_embeddings(len(transformers.AutoTokenizer.from_pretrained(DEMO)))
    model.save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((DEMO / name).read_bytes())
    with pytest.raises(BadInput, match="cannot be exported"):
        taut.compile(folder)
    return folder


def test_what_cannot_be_compiled_falls_back_aloud_on_the_command_line(refused):
    done = run(str(refused), "--prompt", PROMPT, "--max-new-tokens", "7")
    assert done.exit_code == 0
    assert "taut cannot compile this model, so transformers generates" in done.stderr
    assert "MambaForCausalLM" in done.stderr
    *said, last = done.stdout.rstrip().splitlines()
    assert "tokens/s" in last
    assert "GB/s" not in last  # who cannot say what was read, says nothing
    model: Any = transformers.AutoModelForCausalLM.from_pretrained(refused, dtype="auto").eval()
    tokenizer: Any = transformers.AutoTokenizer.from_pretrained(refused)
    prompt = tokenizer(PROMPT, return_tensors="pt")
    whole = model.generate(**prompt, max_new_tokens=7, do_sample=False)[0, prompt["input_ids"].shape[1] :]
    assert "\n".join(said).strip() == tokenizer.decode(whole).strip()


def test_the_fallback_draws_and_tells_as_one_object(refused):
    drawn = (
        "--max-new-tokens",
        "6",
        "--temperature",
        "0.9",
        "--top-k",
        "20",
        "--top-p",
        "0.9",
        "--seed",
        "5",
        "--json",
    )
    one, two = (json.loads(run(str(refused), "--prompt", PROMPT, *drawn).stdout) for _ in range(2))
    assert one["text"] == two["text"]
    assert "cannot be exported" in one["fallback"]
    assert 0 < one["tokens"] <= 6


@pytest.mark.parametrize(
    ("args", "cause"),
    [(("--weights", "int8"), "has no weights 'int8'"), (("--max-length", "2"), "fit into a window of 2")],
)
def test_the_fallback_refuses_what_it_cannot_do(refused, args, cause):
    done = run(str(refused), "--prompt", PROMPT, *args)
    assert done.exit_code == 2
    assert cause in done.stderr


def test_the_fallback_keeps_to_the_window_and_the_dtype(refused):
    room = len(generation.tokenizer_of(refused).encode(PROMPT)) + 3
    done = run(str(refused), "--prompt", PROMPT, "--max-length", str(room), "--weights", "bf16", "--json")
    assert json.loads(done.stdout)["tokens"] <= 3


def test_in_python_nothing_falls_back(refused):
    with pytest.raises(BadInput, match="cannot be exported"):
        list(taut.generate(refused, PROMPT, max_new_tokens=2))


def test_the_fallback_cannot_load_taut_form(refused, tmp_path):
    taut.apply(refused, form="taut", out=tmp_path / "new")
    done = run(str(tmp_path / "new"), "--prompt", PROMPT)
    assert done.exit_code == 2
    assert "in taut form, which transformers cannot load" in done.stderr


def test_a_model_that_is_not_causal(tmp_path):
    model: Any = tiny_model(transformers.AlbertForMaskedLM)
    model.save_pretrained(tmp_path)
    (tmp_path / "tokenizer.json").write_bytes((DEMO / "tokenizer.json").read_bytes())
    done = run(str(tmp_path), "--prompt", PROMPT)
    assert done.exit_code == 2
    assert "no causal language model" in done.stderr


def test_the_fallback_takes_the_revision_that_was_asked_for(refused, monkeypatch):
    asked = []

    def snapshot(repo, revision=None, **rest):
        asked.append(revision)
        return str(refused)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    done = run("someone/something", "--revision", "v1", "--prompt", PROMPT, "--max-new-tokens", "2")
    assert done.exit_code == 0, done.output
    assert set(asked) == {"v1"}


def test_a_character_of_several_tokens_comes_whole():
    tokenizer = generation.tokenizer_of(DEMO)
    said = "naïve café 漢字 🙂 end"
    ids = tokenizer.encode(said)
    shown = list(generation.pieces(iter(ids), tokenizer))
    assert "".join(shown) == tokenizer.decode(ids)
    assert not any("\ufffd" in piece for piece in shown)


def test_the_second_start_imports_no_model_code_and_no_compiler():
    list(taut.generate(DEMO, PROMPT, max_new_tokens=2))
    code = f"""
import sys, taut
list(taut.generate({str(DEMO)!r}, {PROMPT!r}, max_new_tokens=2))
compilers = "torch._dynamo", "numba.np.arrayobj"
print([name for name in sys.modules if name.split(".")[0] == "transformers" or name in compilers])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
