"""The README: its commands run, its output is the true one, its table is the code's. `make readme` renews it."""

from __future__ import annotations

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
HUB_ID = r"\b[A-Za-z]\w+/[\w.-]*\d[\w.-]*\b"


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", README.read_text(), re.M | re.S)


def commands() -> list[str]:
    return [line for block in blocks("sh") for line in block.splitlines() if line]


def between(mark: str) -> str:
    return README.read_text().split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0].strip()


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


VERBS = ("inspect", "plan", "apply", "verify", "techniques", "demo")


def renew() -> None:
    text = README.read_text()
    for mark, new in {"demo": f"```text\n{demo()}\n```", "techniques": markdown(catalogue())}.items():
        old = text.split(f"<!-- {mark} -->\n")[1].split(f"<!-- /{mark} -->")[0]
        text = text.replace(f"<!-- {mark} -->\n{old}<!-- /{mark} -->", f"<!-- {mark} -->\n{new}\n<!-- /{mark} -->")
    README.write_text(text)


if __name__ == "__main__":
    renew()
