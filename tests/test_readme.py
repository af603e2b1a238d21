"""The README: its commands run, its output is the true one, its table is the code's. `make readme` renews it."""

from __future__ import annotations

import json
import os
import re
import shlex
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from taut.cli import app
from taut.demonstrate import MODEL
from taut.techniques import catalogue, markdown

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
CHECKPOINTS = ROOT / "docs" / "checkpoints.md"
RUNTIME = ROOT / "docs" / "runtime.md"
HUB_ID = r"\b[A-Za-z]\w+/[\w.-]*\d[\w.-]*\b"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def block(mark: str) -> re.Pattern:
    """What stands between two comments."""
    return re.compile(rf"(?<=<!-- {mark} -->\n)(.*?)\n?(?=<!-- /{mark} -->)", re.S)


def between(mark: str, path: Path = README) -> str:
    found = block(mark).search(path.read_text())
    assert found is not None
    return found[1]


def streaming() -> str:
    """What was measured of streaming, in words."""
    found = json.loads((ROOT / "benchmarks" / "results" / "streaming.json").read_text())
    return (
        f"Measured on {found['cores']} cores with an 8B-shaped Llama checkpoint of {found['bytes'] / 1e9:.1f} GB in "
        f"bfloat16:\n{found['taut_gb_per_s']:.2f} GB/s where `cp` reaches {found['cp_gb_per_s']:.2f} GB/s (best of "
        f"{len(found['runs']['taut'])} runs each, from a cold cache, until synced), with at most\n"
        f"{found['peak_gb']:.2f} GB of resident memory (`python benchmarks/streaming.py`)."
    )


def decode() -> str:
    """What was measured of decoding, against its peers in the same run."""
    found = json.loads((ROOT / "benchmarks" / "results" / "decode_cpu.json").read_text())
    rows = [
        f"| {r['name']} | {r['ms']:.2f} | {r['gb_per_s']:.1f} | {r['slack']:.2f} | {r['beside']:.2f} |"
        for r in found["rows"]
    ]
    turns = [r["turns"] for r in found["rows"]]
    head = (
        f"A Llama of 135 million parameters (SmolLM2's shape, random weights) on {found['threads']} cores, one "
        f"sequence behind\na prompt of {found['prompt']} tokens, all in one run, turn by turn. The best read of that "
        f"run was {found['bandwidth'] / 1e9:.0f} GB/s\n(`python benchmarks/decode_cpu.py`); the last "
        "column compares\nwith a read right before and after each turn. Others use the memory of this machine: the "
        f"{min(turns)} to {max(turns)}\nturns of each way count beside which it was about as fast as ever."
    )
    return "\n".join([head, "", "| | ms a token | GB/s | slack | beside a read |", "|---|---|---|---|---|", *rows])


def prefill() -> str:
    """What was measured of prompts, against their peers in the same run."""
    found = json.loads((ROOT / "benchmarks" / "results" / "prefill_cpu.json").read_text())
    rows = [f"| {r['name']} | {r['ms']:.0f} | {r['tokens_per_s']:.0f} |" for r in found["rows"]]
    head = (
        f"A prompt of {found['tokens']} tokens on the same model, all in one run, turn by turn\n"
        "(`python benchmarks/prefill_cpu.py`)."
    )
    return "\n".join([head, "", "| | ms | tokens/s |", "|---|---|---|", *rows])


def demo() -> str:
    """What `make demo` prints in a terminal of 80 columns; without the make target's own environment, `taut demo`."""
    here = Path(sys.executable).parent
    command = ["make", "--silent", "demo"] if here == ROOT / ".venv" / "bin" else [str(here / "taut"), "demo"]
    environment = os.environ | {"COLUMNS": "80", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    return "\n".join(line.rstrip() for line in done.stdout.splitlines()).strip()


def without_numbers(text: str) -> list[str]:
    return [" ".join(re.sub(r"\d+(\.\d+)?(e-?\d+)?", "N", line).split()) for line in text.splitlines()]


def online() -> bool:
    try:
        socket.create_connection(("huggingface.co", 443), timeout=3).close()
    except OSError:
        return False
    return True


def test_make_demo_prints_what_the_readme_shows():
    shown = between("demo").removeprefix("```text\n").removesuffix("\n```")
    assert without_numbers(demo()) == without_numbers(shown)
    assert "make demo" in commands()


def test_the_table_of_techniques_is_the_one_of_the_code():
    assert between("techniques") == markdown(catalogue()), "run `make readme`"


def test_the_figures_of_streaming_are_those_measured():
    assert between("streaming", CHECKPOINTS) == streaming(), "run `make readme`"


def test_the_figures_of_decoding_are_those_measured():
    assert between("decode", RUNTIME) == decode(), "run `make readme`"


def test_the_figures_of_prompts_are_those_measured():
    assert between("prefill", RUNTIME) == prefill(), "run `make readme`"


def test_the_python_example_runs(monkeypatch, capsys):
    monkeypatch.chdir(ROOT)
    (example,) = blocks("python")
    exec(compile(example, str(README), "exec"), {})
    assert capsys.readouterr().out.startswith("True ")


def taut_commands() -> list[list[str]]:
    return [shlex.split(line)[1:] for line in commands() if line.startswith("taut ")]


def run(arguments: list[str]) -> None:
    done = CliRunner().invoke(app, arguments)
    assert done.exit_code == 0, done.output


def test_the_commands_run_on_a_model_that_is_here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for arguments in taut_commands():
        run([re.sub(HUB_ID, str(MODEL), word) for word in arguments])
    assert (tmp_path / "smol" / "taut.json").exists()


@pytest.mark.online
def test_the_commands_run_on_the_hub(tmp_path, monkeypatch):
    if not online():
        pytest.skip("THE HUB IS NOT REACHED: the README's commands on a hub model are not run")
    monkeypatch.chdir(tmp_path)
    for arguments in taut_commands():
        run(arguments)


def test_pip_install_brings_all_that_the_commands_need(tmp_path):
    assert "pip install ." in commands()
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-build-isolation"]
    source = tmp_path / "source"
    subprocess.run(["git", "clone", "--quiet", str(ROOT), str(source)], check=True)
    subprocess.run([*pip, "--target", str(tmp_path / "site"), "."], cwd=source, check=True)
    script = "import taut.cli, taut.machine; from taut.demonstrate import MODEL; print(MODEL, taut.machine.__file__)"
    found = subprocess.run(
        [sys.executable, "-c", script], cwd=tmp_path, env=os.environ | {"PYTHONPATH": str(tmp_path / "site")},
        capture_output=True, text=True, check=True,
    ).stdout  # fmt: skip
    assert str(tmp_path / "site" / "taut") in found
    for name in ("demo/model/model.safetensors", "demo/model/tokenizer.json", "demo/heldout.txt"):
        assert (tmp_path / "site" / "taut" / name).exists()
    assert list((tmp_path / "site" / "taut" / "machines").glob("*.toml"))


@pytest.mark.parametrize("path", re.findall(r"\]\((?!http)([^)#]+)\)", README.read_text()))
def test_links_lead_somewhere(path):
    assert (ROOT / path).exists()


def test_every_option_that_the_readme_names_exists():
    helps = {name: CliRunner().invoke(app, [name, "--help"], env={"COLUMNS": "200"}).output for name in VERBS}
    for row in re.findall(r"^\| `taut (\w+).*$", README.read_text(), re.M):
        assert row in helps
    for line in re.findall(r"^\| `taut .*$", README.read_text(), re.M):
        verb = line.split()[2].strip("`")
        for option in re.findall(r"`(--\w+)", line):
            assert option in helps[verb], (verb, option)


VERBS = ("inspect", "plan", "apply", "verify", "generate", "bench", "machines", "techniques", "demo")


def renew(path: Path, mark: str, new: str) -> None:
    path.write_text(block(mark).sub(lambda _: f"{new}\n", path.read_text()))


if __name__ == "__main__":
    renew(README, "techniques", markdown(catalogue()))
    renew(CHECKPOINTS, "streaming", streaming())
    renew(RUNTIME, "decode", decode())
    renew(RUNTIME, "prefill", prefill())
    renew(README, "demo", f"```text\n{demo()}\n```")
