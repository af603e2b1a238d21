"""The engine: greedy tokens as transformers', ragged batches, sampling, what it refuses, and its cache on disk."""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch

import taut
from taut.checkpoint import BadInput
from taut.runtime import saved
from taut.runtime.engine import Engine, _few
from taut.shrink import tiny_model

DEMO = Path(taut.__file__).parent / "demo" / "model"
NONE: tuple[int, ...] = ()


def ids(length: int, seed: int = 0, vocabulary: int = 3000) -> torch.Tensor:
    return torch.randint(3, vocabulary, (length,), generator=torch.Generator().manual_seed(seed))


@pytest.fixture(autouse=True)
def own_cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.getbasetemp() / "cache"))


@pytest.fixture(scope="module")
def demo():
    import transformers

    return transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.float32).eval()


@pytest.fixture(scope="module")
def engine(demo) -> Engine:
    return taut.compile(demo, max_length=300, max_batch=3)


def greedy(model, prompt: torch.Tensor, count: int) -> list[int]:
    options = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "eos_token_id": -1}
    with torch.no_grad():
        return model.generate(prompt[None], **options)[0, len(prompt) :].tolist()


@pytest.mark.parametrize("length", [1, 17, 50])
def test_greedy_tokens_are_those_of_transformers(demo, engine, length):
    prompt = ids(length)
    assert list(engine.generate(prompt, 200, stop=NONE)) == greedy(demo, prompt, 200)


def test_a_trained_checkpoint_gives_the_tokens_of_transformers(weights):
    import transformers

    path = weights / "stories260k"
    model = transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()
    engine = taut.compile(path, weights="fp32")
    prompt = torch.tensor([1])
    assert list(engine.generate(prompt, 200, stop=NONE)) == greedy(model, prompt, 200)


def test_ragged_prompts_without_padding_are_each_as_if_alone(engine):
    prompts = [ids(1, 1), ids(50, 2), ids(13, 3)]
    alone = [list(engine.generate(prompt, 20, stop=NONE)) for prompt in prompts]
    together = list(engine.generate(prompts, 20, stop=NONE))
    assert [list(row) for row in zip(*together, strict=True)] == alone


def test_a_text_that_ends_leaves_the_others_running(engine):
    prompts = [ids(5, 1), ids(9, 2)]
    first, second = ([*engine.generate(p, 12, stop=NONE)] for p in prompts)
    end = next(token for token in first if token not in second)
    steps = list(engine.generate(prompts, 12, stop=[end]))
    assert [row[1] for row in steps] == second
    assert [row[0] for row in steps if row[0] is not None] == first[: first.index(end)]


def test_prefill_in_one_piece_in_chunks_and_token_by_token_agree(demo, engine):
    """Each is at most twice as far from float64 as transformers is: by their digits, processors differ."""
    prompt = ids(40)
    with torch.no_grad():
        truth, theirs = (model(prompt[None]).logits[0, -1] for model in (copy.deepcopy(demo).double(), demo))
    engine.reset()
    whole = engine.prefill(prompt, 0)
    for piece in prompt.split(7):
        chunks = engine.prefill(piece, 1)
    for token in prompt[:-1]:
        engine.prefill(token[None], 2)
    single = engine.prefill(prompt[-1:], 2)
    for found in (whole, chunks, single):
        assert (found - truth).norm() <= 2 * (theirs - truth).norm()


def test_a_short_prompt_of_a_small_model_runs_token_by_token(engine, monkeypatch):
    """Its products cost less than to begin them; a large model reads its weights once for all tokens."""
    assert 4 < engine.few < 50
    assert _few(engine.program, 10**9) == 4
    monkeypatch.setattr(engine.many, "run", None)
    engine.reset()
    engine.prefill(ids(engine.few), 0)
    with pytest.raises(TypeError, match="not callable"):
        engine.prefill(ids(engine.few + 1), 1)


def test_sampled_tokens_follow_from_the_seed_in_any_batch(engine):
    prompts = [ids(5, 1), ids(9, 2)]
    how = {"temperature": 0.8, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "stop": NONE}
    together = [list(row) for row in zip(*engine.generate(prompts, 10, seed=7, **how), strict=True)]
    assert together[0] == list(engine.generate(prompts[0], 10, seed=7, **how))
    assert together[0] != list(engine.generate(prompts[0], 10, seed=8, **how))


def test_a_text_ends_where_the_window_is_full(demo):
    engine = taut.compile(demo, max_length=16)
    assert len(list(engine.generate(ids(10), 100, stop=NONE))) == 16 - 10 + 1


@pytest.mark.parametrize(
    ("call", "cause"),
    [
        (lambda e: e.generate([]), "empty"),
        (lambda e: e.generate([5, 3072]), "3072 is out of range"),
        (lambda e: e.generate([-1]), "-1 is out of range"),
        (lambda e: e.generate(ids(300)), "window of 300"),
        (lambda e: e.generate([[1], [2], [3], [4]]), "4 prompts"),
        (lambda e: e.decode([1, 2, 3, 4]), "4 tokens"),
        (lambda e: e.prefill([1], 3), "slot 3"),
    ],
)
def test_bad_input_is_refused_with_a_cure(engine, call, cause):
    with pytest.raises(BadInput, match=cause) as caught:
        call(engine)
    assert caught.value.cure


@pytest.mark.parametrize(
    ("options", "cause"),
    [
        ({"max_length": 2000}, "1024 positions"),
        ({"max_batch": 10**9}, "GiB are free"),
        ({"cache_dtype": torch.float8_e4m3fn}, "float8"),
        ({"weights": "int3"}, "int3"),
        ({"device": "tpu"}, "tpu"),
    ],
)
def test_what_cannot_be_compiled_is_refused(demo, options, cause):
    with pytest.raises(BadInput, match=cause):
        taut.compile(demo, **options)


def test_a_step_that_cannot_be_exported_says_why():
    import transformers

    with pytest.raises(BadInput, match="MambaForCausalLM"):
        taut.compile(tiny_model(transformers.MambaForCausalLM))


def test_a_rewritten_checkpoint_gives_the_same_tokens_in_both_forms(tmp_path):
    expected = list(taut.compile(DEMO, weights="fp32").generate(ids(9), 20))
    taut.apply(DEMO, out=tmp_path / "stock")
    taut.apply(DEMO, out=tmp_path / "taut", form="taut", only=["merge_linears"])
    assert list(taut.compile(tmp_path / "stock", weights="fp32").generate(ids(9), 20)) == expected
    assert list(taut.compile(tmp_path / "taut", weights="fp32").generate(ids(9), 20)) == expected


def test_the_second_start_exports_nothing(monkeypatch):
    prompt = ids(9)
    first = list(taut.compile(DEMO, max_length=64).generate(prompt, 8))
    monkeypatch.setitem(sys.modules, "taut.opened", None)  # importing it would fail
    told: list[str] = []
    assert list(taut.compile(DEMO, max_length=64, progress=told.append).generate(prompt, 8)) == first
    assert "exporting the step" not in told


def test_experts_that_lie_apart_on_disk_are_found_again(tmp_path):
    """A stack of experts in the model, a tensor each in the checkpoint."""
    import transformers

    tiny_model(transformers.MixtralForCausalLM).save_pretrained(tmp_path)
    first = taut.compile(tmp_path, max_length=16).prefill(ids(9, vocabulary=100))
    told: list[str] = []
    second = taut.compile(tmp_path, max_length=16, progress=told.append).prefill(ids(9, vocabulary=100))
    assert torch.equal(first, second)
    assert "exporting the step" not in told


def test_a_damaged_cache_is_made_anew():
    taut.compile(DEMO, max_length=32)
    for file in saved.folder().iterdir():
        file.write_bytes(file.read_bytes()[:1000])
    told: list[str] = []
    taut.compile(DEMO, max_length=32, progress=told.append)
    assert "exporting the step" in told


def test_weights_stay_as_stored_and_a_bf16_module_computes_the_same():
    import transformers

    stored = taut.compile(DEMO, max_length=64)
    model = transformers.AutoModelForCausalLM.from_pretrained(DEMO, dtype=torch.bfloat16)
    module = taut.compile(model, max_length=64)
    assert torch.equal(stored.prefill(ids(9)), module.prefill(ids(9)))
    assert {step.weight.data.dtype for step in stored.program.steps if hasattr(step, "weight")} == {torch.bfloat16}


@pytest.mark.slow
def test_memory_does_not_grow_over_ten_thousand_tokens(engine):
    import resource

    def run(requests: int) -> int:
        for request in range(requests):
            assert len(list(engine.generate(ids(50, request), 250, stop=NONE))) == 250
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss

    before = run(4)
    assert run(40) - before < 8 << 10  # KiB: less than a byte a logit
