"""Decoding on a GPU: its kernels through the interpreter on any machine, what is refused, and the engine on one."""

from __future__ import annotations

import copy
import functools
import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import taut
from taut.checkpoint import BadInput
from taut.ops._weights import quantize
from taut.runtime import placed
from taut.runtime.steps import Embed, Linear, Program, View, Weight
from taut.shrink import tiny_model

CASES = Path(__file__).with_name("cuda_cases.py")
FAMILIES = {"dense": 8, "padded": 2, "long": 4, "places": 4, "attend": 18, "near": 16, "stretches": 12, "draws": 1}


@pytest.fixture(scope="module")
def cases() -> list[tuple[str, float, float]]:
    """(name, error, plain error) of every case, from one process."""
    if importlib.util.find_spec("triton") is None:
        pytest.skip("KERNELS OF THE DECODE STEP NOT TESTED: Triton is not installed")
    where = dict(os.environ, TRITON_INTERPRET="1")
    done = subprocess.run([sys.executable, str(CASES)], capture_output=True, text=True, env=where, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = (line.rsplit(" ", 2) for line in done.stdout.splitlines())
    return [(name, float(error), float(plain)) for name, error, plain in lines]


@pytest.mark.parametrize("family", FAMILIES)
def test_programs_through_the_kernels_are_as_accurate_as_by_torch(cases, family: str):
    found = [case for case in cases if case[0].startswith(family)]
    assert len(found) == FAMILIES[family]
    for name, error, plain in found:
        assert error <= 2 * plain + torch.finfo(torch.float32).eps, name


def little(form: torch.dtype | str = torch.bfloat16, n: int = 8) -> Program:
    matrix = torch.randn(n, 8)
    held = Weight(*quantize(matrix, 8)) if form == "int8" else Weight(matrix.to(form))  # type: ignore[arg-type]
    steps = Embed("x", held), Linear("logits", View("x", 0, 8), held)
    return Program(steps, {"x": 8, "logits": n}, "logits", ((1, 8, 8),), 16)


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BadInput, match="no GPU") as caught:
        taut.compile(torch.nn.Linear(2, 2), device="cuda")
    assert 'device="cpu"' in caught.value.cure


@pytest.mark.parametrize(
    ("name", "capability", "triton", "cause"),
    [
        ("cuda", (7, 5), True, "7.5"),
        ("cuda", (9, 0), False, "Triton"),
        ("cuda:3", (9, 0), True, "this machine has 1"),
        ("mps", (9, 0), True, "mps"),
        ("gpu", (9, 0), True, "gpu"),
    ],
)
def test_devices_that_cannot_decode_are_refused(monkeypatch, name, capability, triton, cause):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: capability)
    monkeypatch.setattr(placed, "find_spec", lambda module: object() if triton else None)
    with pytest.raises(BadInput, match=cause) as caught:
        placed.gpu(name)
    assert "cpu" in caught.value.cure


def test_what_does_not_fit_is_refused_before_it_is_allocated(monkeypatch):
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**30, 2**31))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 0)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 0)
    device = torch.device("cuda", 0)
    placed.check_room(little(), 2**29, device)
    with pytest.raises(BadInput, match=r"1.0 GiB free.*2.0 GiB of caches"):
        placed.check_room(little(), 2**31, device)


def test_quantized_weights_are_refused_with_the_cpu_by_name():
    with pytest.raises(BadInput, match="int8") as caught:
        placed.check_formats(little("int8"))
    assert 'device="cpu"' in caught.value.cure


def test_a_tied_matrix_is_placed_once():
    moved = placed.placed(little(), torch.device("meta"))
    embed, head = moved.steps
    assert embed.table.data is head.weight.data  # type: ignore[union-attr]
    assert placed.dtype_of(moved) == torch.bfloat16
    assert placed.dtype_of(little(torch.float32)) == torch.float32


# Where there is a GPU

QUICK = (
    "LlamaForCausalLM",
    "Gemma3ForCausalLM",
    "Gemma2ForCausalLM",
    "GPT2LMHeadModel",
    "Phi3ForCausalLM",
    "GPTNeoXForCausalLM",
    "Qwen3ForCausalLM",
    "Olmo2ForCausalLM",
    "CohereForCausalLM",
)
NOT_ON_META = ("BloomForCausalLM", "OPTForCausalLM", "GptOssForCausalLM")
"""Traced where they are, in float32 on the CPU."""
LENGTH, STEPS = 96, 64


@functools.cache
def built(name: str) -> Any:
    import transformers

    model: Any = tiny_model(getattr(transformers, name))
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    return model


@functools.cache
def judged(name: str, dtype: torch.dtype) -> tuple[Any, Tensor, Tensor, Tensor]:
    """The model on the GPU in a dtype, token ids, its logits in true float64, and its own."""
    model = copy.deepcopy(built(name)).to(dtype)
    vocabulary = model.config.get_text_config().vocab_size
    ids = torch.randint(3, vocabulary, (STEPS + 8,), generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        true = copy.deepcopy(model).double()(input_ids=ids[None], use_cache=False).logits[0]
        model = model.cuda()
        own = model(input_ids=ids[None].cuda(), use_cache=False).logits[0].cpu()
    return model, ids, true, own


def error(logits: Tensor, true: Tensor) -> float:
    return float((logits.cpu().double() - true).norm() / true.norm())


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    [(name, dtype) for name in QUICK for dtype in (torch.bfloat16, torch.float32)]
    + [(name, torch.float32) for name in NOT_ON_META],
)
def test_teacher_forced_logits_and_a_ragged_batch_are_as_good_as_the_model_s_own(name, dtype):
    model, ids, true, own = judged(name, dtype)
    limit = 2 * error(own, true) + torch.finfo(dtype).eps / 2
    source = built(name) if name in NOT_ON_META else model
    engine = taut.compile(source, device="cuda", max_length=LENGTH, max_batch=3)
    rows = [engine.prefill(ids[:1]), *(engine.decode([token])[0].clone() for token in ids[1:STEPS].tolist())]
    assert error(torch.stack(rows), true[:STEPS]) <= limit
    engine.reset()
    assert error(engine.prefill(ids[:50]), true[49]) <= 2 * limit
    engine.reset()
    lengths = [1, 50, 13]
    found = [[engine.prefill(ids[:length], slot)] for slot, length in enumerate(lengths)]
    for step in range(8):
        for slot, row in enumerate(engine.decode(ids[[length + step for length in lengths]])):
            found[slot].append(row.clone())
    for slot, length in enumerate(lengths):
        place = slice(length - 1, length + 8)
        assert error(torch.stack(found[slot]), true[place]) <= 2 * max(error(own[place], true[place]), limit / 2)


@pytest.fixture(scope="module")
def demo():
    import transformers

    path = Path(taut.__file__).parent / "demo" / "model"
    return transformers.AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32).eval()


@pytest.mark.gpu
def test_greedy_tokens_are_those_of_transformers(demo):
    engine = taut.compile(demo, device="cuda", max_length=300, max_batch=2)
    prompts = [torch.arange(5, 22), torch.arange(40, 49)]
    for prompt in prompts:
        with torch.no_grad():
            whole = demo.generate(
                prompt[None], max_new_tokens=200, min_new_tokens=200, do_sample=False, eos_token_id=-1
            )
        assert list(engine.generate(prompt, 200, stop=())) == whole[0, len(prompt) :].tolist()
    alone = [list(engine.generate(prompt, 30, stop=())) for prompt in prompts]
    assert [list(row) for row in zip(*engine.generate(prompts, 30, stop=()), strict=True)] == alone


@pytest.mark.gpu
def test_draws_are_those_of_the_cpu(demo):
    on_gpu, on_cpu = (taut.compile(demo, device=device, max_length=100) for device in ("cuda", "cpu"))
    ways: list[dict[str, Any]] = [{"temperature": 0.8}, {"temperature": 0.7, "top_k": 40, "top_p": 0.9, "min_p": 0.01}]
    for how in ways:
        for seed in (3, 4):
            texts = [list(e.generate([5, 6, 7], 40, seed=seed, stop=(), **how)) for e in (on_gpu, on_cpu)]
            assert texts[0] == texts[1]


@pytest.mark.gpu
def test_replays_equal_uncaptured_steps_bit_for_bit_under_load(demo):
    from taut.runtime.cuda import CudaRunner

    program = taut.compile(copy.deepcopy(demo).bfloat16(), max_length=600, max_batch=3).program
    one, other = (CudaRunner(program, 3, capture=capture) for capture in (True, False))
    load, work = torch.cuda.Stream(), torch.randn(2048, 2048, device="cuda").bfloat16()
    for rows in (1, 3):
        tokens, slots = torch.arange(7, 7 + rows), torch.arange(rows)
        for at in (0, 70, 300, 590):
            for runner in (one, other):
                for pair in runner.caches:
                    for i, t in enumerate(pair):
                        t.copy_(torch.randn(t.shape, generator=torch.Generator().manual_seed(i)))
            positions = torch.full((rows,), at)
            expected = other.run(tokens, positions, slots).clone()
            for _ in range(100):
                with torch.cuda.stream(load):
                    torch.mm(work, work)
                assert torch.equal(one.run(tokens, positions, slots), expected)


@pytest.mark.gpu
def test_memory_does_not_grow(demo):
    engine = taut.compile(demo, device="cuda", max_length=300)
    run = lambda: [list(engine.generate(torch.arange(5, 40), 200, stop=(), temperature=t)) for t in (0, 0.5)]  # noqa: E731
    run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    run()
    assert torch.cuda.memory_allocated() == before
