"""The Python API on modules: a new module back, the old one unchanged, and a proof of it."""

from __future__ import annotations

import subprocess
import sys

import architectures
import independent
import pytest
import torch
from torch import nn

import taut
from taut.checkpoint import BadInput
from taut.module import GraphModule
from taut.plans import BadPlan


@pytest.fixture(scope="module")
def model() -> nn.Module:
    return architectures.build("llama")


@pytest.fixture(scope="module")
def folded(model) -> nn.Module:
    return taut.apply(model)


class Block(nn.Module):
    """A module of nobody's library."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up = nn.LayerNorm(8), nn.Linear(8, 12)
        with torch.no_grad():
            self.norm.weight += torch.randn(8)
            self.norm.bias += torch.randn(8)

    def forward(self, x: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"y": self.up(self.norm(x)).relu()}


def test_apply_gives_a_new_module_of_the_same_class(model, folded):
    before = {name: tensor.clone() for name, tensor in architectures.build("llama").state_dict().items()}
    assert type(folded) is type(model)
    assert folded is not model
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, before[name]), name
    assert torch.equal(folded.model.layers[1].input_layernorm.weight, torch.ones(48))
    assert independent.distance(model, folded, architectures.inputs(model)) < 1e-6


def test_parameters_keep_what_they_are(model, folded):
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in folded.named_parameters()]
    assert all(p.requires_grad and p.is_leaf for p in folded.parameters())
    assert not folded.training
    assert taut.apply(architectures.build("llama").train(), only=["fold_norm"]).training


def test_verify(model, folded):
    evidence = taut.verify(model, folded)
    assert evidence.passed
    assert evidence.exactness == "ALGEBRAIC"
    assert evidence.float64_error <= 1e-12
    assert evidence.error_ratio <= 2
    assert evidence.unproved == evidence.wrong_tensors == []


@pytest.mark.parametrize("name", ["model.layers.0.self_attn.k_proj.weight", "lm_head.weight"])
def test_verify_notices_a_single_value(model, name):
    new = taut.apply(model)
    with torch.no_grad():
        new.get_parameter(name)[1, 1] *= 1.01
    evidence = taut.verify(model, new)
    assert not evidence.passed
    assert evidence.wrong_tensors == [name]


def test_verify_without_a_record_proves_nothing(model):
    evidence = taut.verify(model, architectures.build("llama"))
    assert not evidence.passed
    assert evidence.float64_error == 0.0


def test_an_example_must_reach_every_rewritten_parameter():
    model = architectures.build("mixtral")
    folded = taut.apply(model)
    assert taut.verify(model, folded).passed
    short = {"input_ids": torch.tensor([[5]]), "attention_mask": torch.ones(1, 1, dtype=torch.long)}
    evidence = taut.verify(model, folded, example=short)
    assert not evidence.passed
    assert any("experts" in name for name in evidence.unproved)


def test_a_module_of_ones_own_needs_an_example():
    block, x = Block().eval(), torch.randn(3, 8)
    with pytest.raises(ValueError, match="example"):
        taut.apply(block)
    folded = taut.apply(block, example={"x": x})
    assert torch.equal(folded.norm.weight, torch.ones(8))
    assert torch.equal(folded.norm.bias, torch.zeros(8))
    assert taut.verify(block, folded, example={"x": x}).passed
    torch.testing.assert_close(folded(x)["y"], block(x)["y"])


def test_taut_form_is_a_module_for_any_batch_and_length(model):
    new = taut.apply(model, form="taut")
    assert isinstance(new, GraphModule)
    assert taut.verify(model, new).passed
    given = architectures.inputs(model, batch=3, length=11)
    with torch.no_grad():
        torch.testing.assert_close(new(**given)["logits"], model(**given).logits)


def test_only_and_plan(model):
    plan = taut.plan(model, only=["fold_norm"])
    assert [step.rewrite for step in plan.steps] == ["fold_norm"]
    assert plan.applied == 4
    from_plan, from_only = taut.apply(model, plan), taut.apply(model, only=["fold_norm"])
    for name, tensor in from_plan.state_dict().items():
        assert torch.equal(tensor, from_only.state_dict()[name])
    with pytest.raises(BadPlan, match="there is no rewrite"):
        taut.apply(model, only=["fold"])
    with pytest.raises(BadPlan, match="finds no site"):
        taut.apply(Block().eval(), plan, {"x": torch.randn(3, 8)})


def test_inspect(model):
    found = taut.inspect(model)
    folds = [site for site in found.sites if site["rewrite"] == "fold_norm"]
    assert [site["where"] for site in folds if site["refused"]] == ["model.norm"]
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.idle_bytes == 4 * 48 * 4


def test_arguments_that_do_not_go_together(model, tmp_path):
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match="out=DIR"):
        taut.apply(tmp_path / "model")
    with pytest.raises(TypeError, match="two modules or two checkpoints"):
        taut.verify(model, tmp_path / "model")


IMPORTS = """
import sys, time
import torch
start = time.process_time()
import taut
assert taut.__version__
print(time.process_time() - start)
heavy = {"transformers", "numba", "typer", "rich", "safetensors", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
import taut.api, taut.ops.rms_norm
heavy = {"transformers", "numba", "typer", "rich"} & set(sys.modules)
assert not heavy, heavy
"""


def test_words_that_mean_nothing(model):
    with pytest.raises(ValueError, match="no outputs 'logit'"):
        taut.plan(model, outputs="logit")
    with pytest.raises(BadPlan, match="no form 'stok'"):
        taut.plan(model, form="stok")
    with pytest.raises(BadInput, match="no dtype 'bfloat'"):
        taut.inspect(model, dtype="bfloat")
    assert taut.inspect(model, dtype=torch.bfloat16).bytes == taut.inspect(model, dtype="bfloat16").bytes


def test_import_is_light():
    done = subprocess.run([sys.executable, "-c", IMPORTS], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < 0.3


ANYWHERE = """
import importlib, pkgutil, sys
import torch, transformers, numba, typer, rich.console, rich.progress, huggingface_hub, matplotlib.pyplot
for name in ("fcntl", "resource", "termios", "pwd", "grp", "posix_ipc", "triton"):
    sys.modules[name] = None
import taut
for info in pkgutil.walk_packages(taut.__path__, "taut."):
    if "._triton." not in info.name:  # imported when a GPU first needs them
        importlib.import_module(info.name)
"""


def test_every_module_imports_without_what_only_unix_or_a_gpu_has():
    done = subprocess.run([sys.executable, "-c", ANYWHERE], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_every_verb_is_there():
    for verb in taut.__all__:
        assert callable(getattr(taut, verb))
    with pytest.raises(AttributeError):
        taut.nothing  # noqa: B018
