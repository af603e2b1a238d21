"""Bad input: exit code 2, the cause and the cure, and nothing left behind."""

from __future__ import annotations

import errno
import json
import shutil
from pathlib import Path

import pytest
import torch
from cli.commands import WEIGHTS, as_json, copy, refused, run
from safetensors.torch import load_file, save_file

from taut.checkpoint import BadInput
from taut.tautform import load

# What is wrong with a checkpoint: a change to a copy of a good one, and a word that the cause must hold.


def tensors_of(folder: Path, change) -> None:
    tensors = load_file(folder / WEIGHTS)
    change(tensors)
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})


def config_of(folder: Path, **changes) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def empty(folder: Path) -> None:
    shutil.rmtree(folder)
    folder.mkdir()


def truncated(folder: Path) -> None:
    data = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(data[: len(data) // 2])


def wrong_index(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "model-00001-of-00001.safetensors")
    index = {"metadata": {}, "weight_map": {"model.norm.weight": "model-00001-of-00001.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def without_weights(folder: Path) -> None:
    (folder / WEIGHTS).unlink()


def nan(tensors: dict) -> None:
    tensors["model.layers.1.mlp.gate_proj.weight"][0, 0] = float("nan")


def infinite(tensors: dict) -> None:
    tensors["lm_head.weight"][0, 0] = float("inf")


def adapter(folder: Path) -> None:
    empty(folder)
    (folder / "adapter_config.json").write_text("{}")


BROKEN = {
    "missing": (shutil.rmtree, "exist"),
    "empty": (empty, "empty"),
    "no weights": (without_weights, "no weights"),
    "truncated": (truncated, WEIGHTS),
    "corrupt": (lambda f: (f / WEIGHTS).write_bytes(b"\0" * 64), WEIGHTS),
    "wrong index": (wrong_index, "model.safetensors.index.json"),
    "missing tensor": (lambda f: tensors_of(f, lambda t: t.pop("model.norm.weight")), "model.norm.weight"),
    "wrong shape": (
        lambda f: tensors_of(f, lambda t: t.update({"model.norm.weight": torch.ones(7)})),
        "model.norm.weight",
    ),
    "nan": (lambda f: tensors_of(f, nan), "model.layers.1.mlp.gate_proj.weight"),
    "infinite": (lambda f: tensors_of(f, infinite), "lm_head.weight"),
    "gptq": (lambda f: config_of(f, quantization_config={"quant_method": "gptq"}), "gptq"),
    "awq": (lambda f: config_of(f, quantization_config={"quant_method": "awq"}), "awq"),
    "bitsandbytes": (lambda f: config_of(f, quantization_config={"quant_method": "bitsandbytes"}), "bitsandbytes"),
    "fp8": (lambda f: config_of(f, quantization_config={"quant_method": "fp8"}), "fp8"),
    "adapter": (adapter, "adapter"),
    "unknown type": (lambda f: config_of(f, model_type="unheard_of", architectures=["Unheard"]), "unheard_of"),
    "remote code": (
        lambda f: config_of(f, model_type="unheard_of", auto_map={"AutoModelForCausalLM": "code.Model"}),
        "code of its own",
    ),
    "config": (lambda f: (f / "config.json").write_text("{"), "config.json"),
}


@pytest.mark.parametrize("kind", BROKEN)
def test_broken_checkpoints(model, tmp_path, kind):
    damage, word = BROKEN[kind]
    broken = copy(model, tmp_path / "broken")
    damage(broken)
    refused(tmp_path, word, "apply", broken, "--out", tmp_path / "new")
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("kind", ["missing", "truncated", "missing tensor", "gptq"])
@pytest.mark.parametrize("verb", ["inspect", "plan", "verify before", "verify after", "verify record"])
def test_broken_checkpoints_elsewhere(model, rewritten, tmp_path, kind, verb):
    damage, word = BROKEN[kind]
    broken = copy(rewritten if verb == "verify record" else model, tmp_path / "broken")
    damage(broken)
    verb, *place = verb.split()
    others = {"before": (broken, model), "after": (model, broken), "record": (model, broken)}
    refused(tmp_path, word, verb, *(others[place[0]] if place else (broken,)))


@pytest.mark.parametrize("kind", ["missing", "misshapen"])
def test_a_broken_taut_form(model, tmp_path, kind):
    as_json("apply", model, "--out", tmp_path / "new", "--form", "taut", "--only", "merge_linears")
    (file,) = (tmp_path / "new").glob("*.safetensors")
    index = tmp_path / "new" / "taut.safetensors.index.json"
    tensors, found = load_file(file), json.loads(index.read_text())
    name = next(name for name in tensors if "q_proj" in name)
    tensors[name] = tensors[name][:-1].clone()
    if kind == "missing":
        del tensors[name], found["weight_map"][name]
    save_file(tensors, file, metadata={"format": "pt"})
    index.write_text(json.dumps(found))
    refused(tmp_path, name, "verify", model, tmp_path / "new")
    with pytest.raises(BadInput, match=name):
        load(tmp_path / "new")


@pytest.mark.parametrize("plan", [None, 3, {}, {"form": "taut"}])
def test_a_broken_record(model, rewritten, tmp_path, plan):
    new = copy(rewritten, tmp_path / "new")
    (new / "taut.json").write_text(json.dumps({"plan": plan}))
    refused(tmp_path, "taut.json", "verify", model, new)


def test_outputs_that_are_refused(model, tmp_path):
    (tmp_path / "file").write_text("a file")
    (tmp_path / "full").mkdir()
    source = copy(model, tmp_path / "source")
    refused(tmp_path, "overlaps the source", "apply", source, "--out", source, "--force")
    refused(tmp_path, "overlaps the source", "apply", source, "--out", source / "new")
    refused(tmp_path, "exists", "apply", source, "--out", tmp_path / "full")
    refused(tmp_path, "is not a folder", "apply", source, "--out", tmp_path / "file" / "new")
    refused(tmp_path, "does not exist", "apply", source, "--out", tmp_path / "no" / "new")


def test_a_refused_output_is_refused_before_the_work(model, tmp_path, monkeypatch):
    monkeypatch.setattr("taut.on_disk.lift", lambda graph: pytest.fail("the work was begun"))
    refused(tmp_path, "exists", "apply", model, "--out", tmp_path)


def test_names_that_are_not_known(model, tmp_path):
    out = ("--out", tmp_path / "new")
    refused(tmp_path, "there is no rewrite 'fold'", "apply", model, *out, "--only", "fold")
    refused(tmp_path, "--form taut", "apply", model, *out, "--only", "merge_linears")
    assert run("apply", model, *out, "--form", "other").exit_code == 2
    assert run("apply", model).exit_code == 2
    assert run("unknown").exit_code == 2
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("text", "word"),
    [
        (None, "cannot read a plan"),
        ("{", "cannot read a plan"),
        ("[]", "not a plan"),
        ("{}", "not a plan"),
        ('{"schema": 99}', "schema 99"),
        ('{"schema": 1, "form": "other", "outputs": "all", "steps": []}', "not a plan"),
        ('{"schema": 1, "form": "stock", "outputs": "some", "steps": []}', "not a plan"),
        ('{"schema": 1, "form": "stock", "outputs": "all", "steps": [{"rewrite": "x", "sites": []}]}', "'x'"),
        (
            '{"schema": 1, "form": "stock", "outputs": "all", "steps": [{"rewrite": "fold_norm", "sites": ["no"]}]}',
            "'no'",
        ),
        (
            '{"schema": 1, "form": "stock", "outputs": "all", '
            '"steps": [{"rewrite": "fold_norm", "sites": ["model.norm"]}]}',
            "output",
        ),
    ],
)
def test_plans_that_are_none(model, tmp_path, text, word):
    plan = tmp_path / "plan.json"
    if text is not None:
        plan.write_text(text)
    refused(tmp_path, word, "apply", model, "--out", tmp_path / "new", "--plan", plan)


def test_a_plan_and_only(model, tmp_path):
    as_json("plan", model, "--out", tmp_path / "plan.json")
    more = ("--plan", tmp_path / "plan.json", "--only", "fold_norm")
    refused(tmp_path, "--only", "apply", model, "--out", tmp_path / "new", *more)
    refused(tmp_path, "cannot write", "plan", model, "--out", tmp_path / "plan.json" / "below")


CODE = """
from transformers import PretrainedConfig, PreTrainedModel
import torch

class Config(PretrainedConfig):
    model_type = "unheard_of"

class Model(PreTrainedModel):
    config_class = Config
    base_model_prefix = ""

    def __init__(self, config):
        super().__init__(config)
        self.embed = torch.nn.Embedding(9, 4)
        self.post_init()

    def forward(self, input_ids, attention_mask=None):
        x = self.embed(input_ids)
        return {"logits": x if x.sum() > 0 else -x}
"""


def test_a_model_that_cannot_be_traced(tmp_path, monkeypatch):
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path.parent / "modules"))
    source = tmp_path / "source"
    source.mkdir()
    (source / "code.py").write_text(CODE)
    mapped = {"AutoConfig": "code.Config", "AutoModelForCausalLM": "code.Model"}
    (source / "config.json").write_text(
        json.dumps({"model_type": "unheard_of", "architectures": ["Model"], "auto_map": mapped, "vocab_size": 9})
    )
    save_file({"embed.weight": torch.randn(9, 4)}, source / WEIGHTS, metadata={"format": "pt"})
    refused(tmp_path, "code of its own", "inspect", source)
    refused(tmp_path, "cannot be exported", "apply", source, "--trust-remote-code", "--out", tmp_path / "new")


def test_the_hub_out_of_reach(tmp_path, monkeypatch):
    from huggingface_hub.errors import LocalEntryNotFoundError

    def offline(*args, **kwargs):
        raise LocalEntryNotFoundError("offline")

    monkeypatch.setattr("huggingface_hub.snapshot_download", offline)
    refused(tmp_path, "hub cannot be reached", "inspect", "someone/something")
    refused(tmp_path, "hub cannot be reached", "inspect", "someone/something", "--revision", "main")


def test_a_folder_has_no_revision(model, tmp_path):
    refused(tmp_path, "no revisions", "inspect", model, "--revision", "main")


def test_what_the_system_refuses(tmp_path, monkeypatch):
    def full():
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("taut.techniques.catalogue", full)
    refused(tmp_path, "No space left", "techniques")
