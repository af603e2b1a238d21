"""The command line: exit codes, what goes to stdout, and that bad input leaves nothing behind."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import architectures
import independent
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from typer.testing import CliRunner

import taut
from taut.checkpoint import BadInput
from taut.cli import app
from taut.tautform import load

WEIGHTS = "model.safetensors"


def run(*arguments: object):
    """Run taut; what it does not explain is raised here."""
    result = CliRunner().invoke(app, [str(a) for a in arguments], env={"COLUMNS": "80"})
    if result.exception is not None and not isinstance(result.exception, SystemExit):
        raise result.exception
    return result


def as_json(*arguments: object, code: int = 0) -> dict:
    """The one JSON object that `--json` prints, and nothing else on stdout."""
    result = run(*arguments, "--json")
    assert result.exit_code == code, result.output
    found = json.loads(result.stdout)
    assert isinstance(found, dict)
    return found


def contents(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def copy(source: Path, target: Path) -> Path:
    return Path(shutil.copytree(source, target))


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "llama"
    architectures.build("llama").save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def rewritten(model, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("rewritten") / "new"
    found = as_json("apply", model, "--out", out)
    assert found["out"] == str(out)
    assert {"rewrite": "fold_norm", "where": "model.layers.0.input_layernorm"} in found["applied"]
    assert [r["where"] for r in found["refused"] if r["rewrite"] == "fold_norm"] == ["model.norm"]
    assert all(r["reason"] for r in found["refused"])
    assert found["evidence"]["passed"] is True
    return out


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
    assert "q_proj+k_proj+v_proj" in run("inspect", model, "--all").stdout


def test_inspect_needs_no_weights(model, tmp_path):
    shutil.copy(model / "config.json", tmp_path)
    assert as_json("inspect", tmp_path)["sites"] == as_json("inspect", model)["sites"]
    assert as_json("plan", tmp_path) == as_json("plan", model)


def test_verify(model, rewritten):
    found = as_json("verify", model, rewritten)
    assert found["passed"] is True
    assert found["exactness"] == "ALGEBRAIC"
    assert found["float64_error"] <= 1e-12
    assert found["error_ratio"] <= 2
    assert isinstance(found["worst"], str)
    assert "proved" in run("verify", model, rewritten).stdout


def test_the_rewritten_checkpoint_is_the_same_model(model, rewritten):
    before, after = (transformers.LlamaForCausalLM.from_pretrained(path) for path in (model, rewritten))
    assert independent.distance(before, after, architectures.inputs(before)) < 1e-6
    folded = load_file(rewritten / WEIGHTS)["model.layers.0.input_layernorm.weight"]
    assert torch.equal(folded, torch.ones(48))


def test_twice_gives_the_same_bytes(model, rewritten, tmp_path):
    as_json("apply", model, "--out", tmp_path / "new")
    assert contents(tmp_path / "new") == contents(rewritten)


def test_full_size_proof(model, rewritten, tmp_path):
    found = as_json("apply", model, "--out", tmp_path / "new", "--verify", "--threads", "1")
    assert "proved on the full-size model" in found["evidence"]["notes"]
    assert contents(tmp_path / "new")[WEIGHTS] == contents(rewritten)[WEIGHTS]


@pytest.mark.parametrize("name", ["model.layers.0.mlp.up_proj.weight", "model.embed_tokens.weight"])
def test_a_checkpoint_that_was_tampered_with(model, rewritten, tmp_path, name):
    new = copy(rewritten, tmp_path / "new")
    tensors = load_file(new / WEIGHTS)
    tensors[name][3, 5] += 1e-6
    save_file(tensors, new / WEIGHTS, metadata={"format": "pt"})
    found = as_json("verify", model, new, code=1)
    assert found["passed"] is False
    assert name in found["wrong_tensors"]
    assert "NOT proved" in run("verify", model, new).stdout


def test_without_a_record_there_is_a_comparison_and_no_proof(model, tmp_path):
    new = copy(model, tmp_path / "new")
    found = as_json("verify", model, new, code=1)
    assert found["passed"] is False
    assert found["float64_error"] == 0.0
    printed = run("verify", model, new)
    assert printed.exit_code == 1
    assert "no record" in printed.stdout
    assert "logits differs by 0.000e+00" in printed.stdout


@pytest.mark.parametrize("form", ["stock", "taut"])
def test_where_nothing_applies_nothing_is_written(model, tmp_path, form):
    asked = ("apply", model, "--out", tmp_path / "new", "--only", "fold_qk_norm_gain", "--form", form)
    found = as_json(*asked)
    assert (found["out"], found["applied"]) == (None, [])
    assert found["absent"]["fold_qk_norm_gain"]
    printed = run(*asked)
    assert printed.exit_code == 0
    assert "nothing was written" in printed.stdout
    assert not list(tmp_path.iterdir())


def test_applying_again_writes_nothing(rewritten, tmp_path):
    found = as_json("apply", rewritten, "--out", tmp_path / "new")
    assert (found["out"], found["applied"]) == (None, [])
    assert {r["reason"] for r in found["refused"]} >= {"already folded: its gain is one"}
    assert not list(tmp_path.iterdir())


def test_plan_round_trip(model, rewritten, tmp_path):
    plan = as_json("plan", model, "--only", "fold_norm", "--out", tmp_path / "plan.json")
    assert json.loads((tmp_path / "plan.json").read_text()) == plan
    applied = as_json("apply", model, "--out", tmp_path / "new", "--plan", tmp_path / "plan.json")
    assert {site["where"] for site in applied["applied"]} == set(plan["steps"][0]["sites"])
    assert contents(tmp_path / "new")[WEIGHTS] == contents(rewritten)[WEIGHTS]
    plan["steps"][0]["sites"] = plan["steps"][0]["sites"][:1]
    (tmp_path / "one.json").write_text(json.dumps(plan))
    as_json("apply", model, "--out", tmp_path / "one", "--plan", tmp_path / "one.json")
    assert load_file(tmp_path / "one" / WEIGHTS)["model.layers.1.input_layernorm.weight"].std() > 0


def test_taut_form_round_trip(model, tmp_path):
    applied = as_json("apply", model, "--out", tmp_path / "new", "--form", "taut")
    assert {"fold_norm", "merge_linears", "defer_norm"} <= {site["rewrite"] for site in applied["applied"]}
    assert as_json("verify", model, tmp_path / "new")["passed"] is True
    stock = transformers.LlamaForCausalLM.from_pretrained(model)
    given = architectures.inputs(stock, batch=3, length=9)
    with torch.no_grad():
        torch.testing.assert_close(load(tmp_path / "new")(**given)["logits"], stock(**given).logits)


def test_a_taut_form_of_structure_alone(model, tmp_path):
    """Deferring a division changes no tensor, and is something to write all the same."""
    plan = as_json("plan", model, "--form", "taut", "--only", "defer_norm", "--out", tmp_path / "plan.json")
    assert plan["steps"]
    applied = as_json("apply", model, "--out", tmp_path / "new", "--plan", tmp_path / "plan.json")
    assert applied["out"] == str(tmp_path / "new")
    assert as_json("verify", model, tmp_path / "new")["passed"] is True


def test_outputs_logits_gives_up_the_hidden_state(model, tmp_path):
    applied = as_json("apply", model, "--out", tmp_path / "new", "--outputs", "logits")
    assert {"rewrite": "fold_norm", "where": "model.norm"} in applied["applied"]
    found = as_json("verify", model, tmp_path / "new")
    assert (found["passed"], list(found["outputs"])) == (True, ["logits"])


def test_untie(tmp_path):
    tied = architectures.build("qwen3")
    tied.config.tie_word_embeddings = True
    tied.tie_weights()
    tied.save_pretrained(tmp_path / "tied")
    kept = as_json("apply", tmp_path / "tied", "--out", tmp_path / "kept", "--outputs", "logits")
    assert "tied" in next(r["reason"] for r in kept["refused"] if r["where"] == "model.norm")
    untied = as_json("apply", tmp_path / "tied", "--out", tmp_path / "new", "--outputs", "logits", "--untie")
    assert {"rewrite": "fold_norm", "where": "model.norm"} in untied["applied"]
    assert json.loads((tmp_path / "new" / "config.json").read_text())["tie_word_embeddings"] is False
    assert as_json("verify", tmp_path / "tied", tmp_path / "new")["passed"] is True
    after = transformers.Qwen3ForCausalLM.from_pretrained(tmp_path / "new")
    given = architectures.inputs(after)
    with torch.no_grad():
        torch.testing.assert_close(after(**given).logits, tied.eval()(**given).logits)


def test_force_replaces(model, rewritten, tmp_path):
    new = copy(model, tmp_path / "new")
    (new / "old.txt").write_text("old")
    as_json("apply", model, "--out", new, "--force")
    assert contents(new) == contents(rewritten)


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


def refused(tmp_path: Path, word: str, *arguments: object) -> None:
    """Exit code 2, the cause and the cure, no traceback, and the folder as it was."""
    before = contents(tmp_path)
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert result.stdout == ""
    cause, cure = result.stderr.strip().splitlines()
    assert cause.startswith("error: ")
    assert word in cause
    assert cure.startswith("cure:  ")
    assert len(cure) > len("cure:  ")
    found = as_json(*arguments, code=2)
    assert (found["error"], found["cure"]) == (cause.removeprefix("error: "), cure.removeprefix("cure:  "))
    assert contents(tmp_path) == before
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


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
    refused(tmp_path, "file", "apply", source, "--out", tmp_path / "file" / "new")
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


def test_interruption_leaves_nothing(model, tmp_path, monkeypatch):
    def interrupt(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr("taut.checkpoint.write.Streamer", interrupt)
    result = run("apply", model, "--out", tmp_path / "new")
    assert result.exit_code == 130
    assert "nothing was left behind" in result.stderr
    assert not list(tmp_path.iterdir())


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


def test_techniques():
    found = as_json("techniques")["techniques"]
    assert {"rewrite", "op", "module", "method"} == {row["kind"] for row in found}
    assert all(row["source"] and row["summary"] for row in found)
    assert "fold_norm" in run("techniques").stdout


def test_version_and_help():
    assert run("--version").stdout == f"taut {taut.__version__}\n"
    printed = run().output
    for verb in ("inspect", "plan", "apply", "verify", "techniques", "demo"):
        assert verb in printed


@pytest.mark.parametrize("verb", ["inspect", "plan", "apply", "verify"])
def test_the_same_options_everywhere(verb):
    printed = CliRunner().invoke(app, [verb, "--help"], env={"COLUMNS": "200"}).output
    for option in ("--json", "--revision", "--trust-remote-code", "--dtype", "--threads"):
        assert option in printed
