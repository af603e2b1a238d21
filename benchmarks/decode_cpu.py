"""Decode on a CPU: one token after the other of a SmolLM2-135M-shaped Llama with random weights, peers in one run.

    python benchmarks/decode_cpu.py [--only taut,transformers,llama.cpp] [--formats fp32,bf16,int8,int4]
                                    [--rounds 6] [--tokens 16] [--growth] [--json FILE] [--plot FILE]

All take turns of a few tokens after a prompt of 64; the time is the median over the turns. On a machine whose memory
others use too, its speed changes by the second: where there are enough of them, only turns count before and after which
a plain read was about as fast as the fastest of all (give many rounds there). Slack is the time over that of reading
what a token needs, as it is stored, at the best read bandwidth found in the same run, before, between and after the
turns; below 1 a cache served some of it, or the weights were compressed. `beside` is the same against the plain reads
beside each turn, the median. llama.cpp joins where `llama_cpp` and `gguf` can be imported. `--growth` measures taut
alone against context and batch.
"""

from __future__ import annotations

import argparse
import itertools
import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from taut.huge_pages import collapse
from taut.machine import cpu_name, read_bandwidth, read_size
from taut.ops._numba.read import read
from taut.ops._weights import quantize
from taut.runtime.runner import Runner, bytes_read
from taut.runtime.sampling import Sampling
from taut.runtime.steps import Attend, Embed, Glu, Linear, Norm, Program, Rotary, View, Weight

HIDDEN, FFN, LAYERS, HEADS, KV_HEADS, D, VOCABULARY = 576, 1536, 30, 9, 3, 64, 49152
PROMPT, LONGEST, EPS, BASE = 64, 4096 + 64, 1e-5, 10000.0
FORMATS = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": 8, "int4": 4}
CALM, FEW = 0.85, 5
"""Turns count whose memory was at least so fast, of the fastest read; that many are the least that will do."""
Weights = dict[str, Tensor]
Turn = Callable[[int], Tensor]
"""Run so many tokens from the end of the prompt on, and give the last logits."""


@dataclass(frozen=True)
class Row:
    name: str
    ms: float
    gb_per_s: float
    slack: float
    beside: float
    turns: int


class Beside(NamedTuple):
    """Seconds a token of one turn, and bytes a second of plain reads right before and after it."""

    seconds: float
    before: float
    after: float


def random_weights() -> Weights:
    """Weights by the names of a Llama checkpoint; the head is the embedding."""
    torch.manual_seed(0)
    kv, shapes = KV_HEADS * D, {"embed_tokens": (VOCABULARY, HIDDEN)}
    for i in range(LAYERS):
        each = {"self_attn.q_proj": (HIDDEN, HIDDEN), "self_attn.k_proj": (kv, HIDDEN)}
        each |= {"self_attn.v_proj": (kv, HIDDEN), "self_attn.o_proj": (HIDDEN, HIDDEN)}
        each |= {"mlp.gate_proj": (FFN, HIDDEN), "mlp.up_proj": (FFN, HIDDEN), "mlp.down_proj": (HIDDEN, FFN)}
        shapes |= {f"layers.{i}.{name}": shape for name, shape in each.items()}
    return {name: torch.randn(shape).mul_(shape[1] ** -0.5) for name, shape in shapes.items()}


def stored(weight: Tensor, form: torch.dtype | int) -> Weight:
    return Weight(*quantize(weight, form)) if isinstance(form, int) else Weight(weight.to(form))


def llama(weights: Weights, form: torch.dtype | int, longest: int = LONGEST) -> Program:
    """The decode program of the model, its gains folded."""
    angles = torch.arange(longest)[:, None] * BASE ** -(torch.arange(0, D, 2) / D)
    norm, rotary, head = Norm(EPS), Rotary(angles.cos(), angles.sin()), stored(weights["embed_tokens"], form)
    q, kv = HEADS * D, KV_HEADS * D
    steps: list[Any] = [Embed("x0", head)]
    widths = {"x0": HIDDEN, "logits": VOCABULARY}
    for i in range(LAYERS):
        w = {name.split(".")[-1][0]: weights[name] for name in weights if name.startswith(f"layers.{i}.self_attn")}
        mlp = {name: stored(weights[f"layers.{i}.mlp.{name}_proj"], form) for name in ("gate", "up", "down")}
        x, qkv, y, mid, h = f"x{i}", f"qkv{i}", f"y{i}", f"mid{i}", f"h{i}"
        widths |= {qkv: q + 2 * kv, y: q, mid: HIDDEN, h: FFN, f"x{i + 1}": HIDDEN}
        of = lambda name, widths=widths: View(name, 0, widths[name])  # noqa: E731
        views = View(qkv, 0, q), View(qkv, q, q + kv), View(qkv, q + kv, q + 2 * kv)
        steps += [
            Linear(qkv, of(x), stored(torch.cat((w["q"], w["k"], w["v"])), form), norm=norm),
            Attend(y, *views, i, HEADS, KV_HEADS, D, D, D**-0.5, rotary),
            Linear(mid, of(y), stored(w["o"], form), residual=of(x)),
            Glu(h, of(mid), mlp["gate"], mlp["up"], "silu", norm=norm),
            Linear(f"x{i + 1}", of(h), mlp["down"], residual=of(mid)),
        ]
    steps.append(Linear("logits", View(f"x{LAYERS}", 0, HIDDEN), head, norm=norm))
    return Program(tuple(steps), widths, "logits", ((KV_HEADS, D, D),) * LAYERS, longest)


def prompt() -> Tensor:
    return torch.randint(VOCABULARY, (PROMPT,), generator=torch.Generator().manual_seed(1))


def taut_turn(runner: Runner) -> Turn:
    """Greedy tokens from the prompt's end; the prompt goes through the decode step."""
    for i, token in enumerate(prompt().tolist()):
        (first,) = runner.draw([token], [i], [0], Sampling())

    def turn(tokens: int) -> Tensor:
        token = first
        for i in range(tokens):
            (token,) = runner.draw([token], [PROMPT + i], [0], Sampling())
        return runner.logits[0]

    return turn


def transformers_turn(weights: Weights) -> Turn:
    """transformers in float32, eager attention, dynamic cache."""
    import transformers

    config = transformers.LlamaConfig(
        hidden_size=HIDDEN, intermediate_size=FFN, num_hidden_layers=LAYERS, num_attention_heads=HEADS,
        num_key_value_heads=KV_HEADS, head_dim=D, vocab_size=VOCABULARY, max_position_embeddings=LONGEST,
        rms_norm_eps=EPS, rope_theta=BASE, tie_word_embeddings=True, attn_implementation="eager",
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config).eval()
    named = {f"model.{name}.weight": value for name, value in weights.items()}
    model.load_state_dict(named | {"lm_head.weight": weights["embed_tokens"]}, strict=False)
    past = model(prompt()[None], use_cache=True)
    first, cache = past.logits[:, -1:].argmax(-1), past.past_key_values

    def turn(tokens: int) -> Tensor:
        token, found = first, past.logits
        for _ in range(tokens):
            found = model(token, past_key_values=cache, use_cache=True).logits
            token = found[:, -1:].argmax(-1)
        cache.crop(-tokens)
        return found[0, -1]

    return turn


def llama_cpp_turn(weights: Weights, form: str, folder: Path) -> Turn:
    """llama.cpp on the same weights in its own format of as many bits."""
    import llama_cpp
    import numpy as np

    path = folder / f"{form}.gguf"
    write_gguf(weights, form, path)
    threads = torch.get_num_threads()
    kinds = {"type_k": llama_cpp.GGML_TYPE_F32, "type_v": llama_cpp.GGML_TYPE_F32} if form == "fp32" else {}
    model = llama_cpp.Llama(
        str(path), n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False, logits_all=False, **kinds
    )
    model.eval(prompt().tolist())
    read = lambda: np.ctypeslib.as_array(llama_cpp.llama_get_logits_ith(model.ctx, -1), (VOCABULARY,))  # noqa: E731
    first = int(read().argmax())

    def turn(tokens: int) -> Tensor:
        token, model.n_tokens = first, PROMPT
        llama_cpp.llama_memory_seq_rm(llama_cpp.llama_get_memory(model.ctx), 0, PROMPT, -1)
        for _ in range(tokens):
            model.eval([token])
            token = int(read().argmax())
        return torch.from_numpy(read().copy())

    return turn


def write_gguf(weights: Weights, form: str, path: Path) -> None:
    """The model as llama.cpp reads it, with a vocabulary of made-up words."""
    import gguf

    kind = {"fp32": "F32", "bf16": "BF16", "int8": "Q8_0", "int4": "Q4_0"}[form]
    kind = getattr(gguf.GGMLQuantizationType, kind)
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_context_length(LONGEST)
    writer.add_embedding_length(HIDDEN)
    writer.add_block_count(LAYERS)
    writer.add_feed_forward_length(FFN)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(EPS)
    writer.add_rope_dimension_count(D)
    writer.add_rope_freq_base(BASE)
    writer.add_vocab_size(VOCABULARY)
    writer.add_tokenizer_model("llama")
    writer.add_token_list([b"<unk>", b"<s>", b"</s>", *(f"w{i}".encode() for i in range(3, VOCABULARY))])
    writer.add_token_scores([0.0] * VOCABULARY)
    writer.add_token_types([2, 3, 3] + [1] * (VOCABULARY - 3))
    names = {"embed_tokens": "token_embd", "q_proj": "attn_q", "k_proj": "attn_k", "v_proj": "attn_v"}
    names |= {"o_proj": "attn_output", "gate_proj": "ffn_gate", "up_proj": "ffn_up", "down_proj": "ffn_down"}

    def add(name: str, values: Tensor, kind: Any = gguf.GGMLQuantizationType.F32) -> None:
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(values.numpy(), kind), raw_dtype=kind)

    for name, value in weights.items():
        layer, last = name.split(".")[1:2], name.split(".")[-1]
        if last in ("q_proj", "k_proj"):  # llama.cpp turns neighbours, transformers turns halves
            value = value.unflatten(0, (-1, 2, D // 2)).transpose(1, 2).flatten(0, 2).contiguous()
        add(".".join(["blk", *layer, names[last]] if layer else [names[last]]), value, kind)
    for i in range(LAYERS):
        add(f"blk.{i}.attn_norm", torch.ones(HIDDEN))
        add(f"blk.{i}.ffn_norm", torch.ones(HIDDEN))
    add("output_norm", torch.ones(HIDDEN))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def llama_cpp_here() -> bool:
    try:
        import gguf  # noqa: F401
        import llama_cpp  # noqa: F401
    except ImportError:
        print("LLAMA.CPP NOT MEASURED: llama_cpp and gguf cannot be imported", flush=True)
        return False
    return True


def players(weights: Weights, only: list[str], formats: list[str], folder: Path) -> dict[str, tuple[Turn, int]]:
    """(turn, bytes that a token must read) by name."""
    found = dict[str, tuple[Turn, int]]()
    positions = [PROMPT]
    cpp = "llama.cpp" in only and llama_cpp_here()
    for form in formats:
        cache = torch.bfloat16 if form == "bf16" else torch.float32
        runner = Runner(llama(weights, FORMATS[form], 512), 1, cache)
        runner.settle()
        least = bytes_read(runner.program.steps, runner.caches, positions)
        found[f"taut {form}"] = taut_turn(runner), least
        if cpp:
            found[f"llama.cpp {form}"] = llama_cpp_turn(weights, form, folder), least
    if "transformers" in only:
        least = sum(w.nbytes for w in weights.values())
        found["transformers fp32"] = transformers_turn(weights), least
    return {name: value for name, value in found.items() if name.split()[0] in only}


def check_parity(turns: dict[str, tuple[Turn, int]]) -> None:
    """The float32 logits of all players are those of float64 up to rounding; the others' are told."""
    logits = {name: turn(1) for name, (turn, _) in turns.items()}
    truth = next((value for name, value in logits.items() if name.endswith("fp32")), next(iter(logits.values())))
    for name, value in logits.items():
        error = float((value - truth).norm() / truth.norm())
        print(f"{name:20} logits off by {error:.1e} of the first in fp32")
        assert not name.endswith("fp32") or error < 1e-4, name


def interleaved(turns: dict[str, tuple[Turn, int]], rounds: int, tokens: int) -> tuple[list[Row], float]:
    """(rows, the best read bandwidth seen between the rounds)"""
    seen: dict[str, list[Beside]] = {name: [] for name in turns}
    best = read_bandwidth(read_size(), seconds=0.3).value
    values = torch.ones(read_size() // 4)
    collapse([values])
    for _ in range(rounds):
        for name, (turn, _) in turns.items():
            turn(1)
            before, start = now_read(values), time.perf_counter()
            turn(tokens)
            seconds = (time.perf_counter() - start) / tokens
            seen[name].append(Beside(seconds, before, now_read(values)))
        best = max(best, read_bandwidth(read_size(), seconds=0.1).value)
    seen = calm(seen)
    rows = []
    for name, (_, least) in turns.items():
        seconds = statistics.median(turn.seconds for turn in seen[name])
        beside = statistics.median(turn.seconds * (turn.before + turn.after) / 2 / least for turn in seen[name])
        rows.append(Row(name, seconds * 1e3, least / seconds / 1e9, seconds * best / least, beside, len(seen[name])))
    return rows, best


def calm(seen: dict[str, list[Beside]]) -> dict[str, list[Beside]]:
    """The turns before and after which memory was about as fast as ever; all of them where a player has too few."""
    bar = CALM * max(max(turn.before, turn.after) for turns in seen.values() for turn in turns)
    found = {name: [turn for turn in turns if min(turn.before, turn.after) >= bar] for name, turns in seen.items()}
    return found if min(map(len, found.values())) >= FEW else seen


def now_read(values: Tensor) -> float:
    """Bytes a second of a plain read, the median of three."""
    seconds = []
    for _ in range(3):
        start = time.perf_counter()
        read(values.data_ptr(), values.numel(), torch.get_num_threads())
        seconds.append(time.perf_counter() - start)
    return values.nbytes / statistics.median(seconds)


def growth(weights: Weights, form: str, rounds: int) -> list[dict[str, float]]:
    """Time of a step against context (batch 1) and against batch (context 64).

    `read` has the bytes that a plain read right before and after it would have read in that time.
    """
    program, cache = llama(weights, FORMATS[form]), torch.bfloat16 if form == "bf16" else torch.float32
    runners, values = {slots: Runner(program, slots, cache) for slots in (1, 16)}, torch.ones(read_size() // 4)
    collapse([values])
    for runner in runners.values():
        for kept in itertools.chain.from_iterable(runner.caches):
            kept.normal_()
    points = [(context, 1) for context in (64, 256, 512, 1024, 2048, 4096)]
    points += [(64, batch) for batch in (2, 3, 4, 6, 8, 12, 16)]
    times: dict[tuple[int, int], list[tuple[float, float]]] = {point: [] for point in points}
    for _ in range(rounds):
        for context, batch in points:
            runner = runners[min(slots for slots in runners if slots >= batch)]
            inputs = [i + 5 for i in range(batch)], [context - 1] * batch, list(range(batch))
            runner.run(*inputs)
            runner.settle()
            before, start = now_read(values), time.perf_counter()
            runner.run(*inputs)
            seconds = time.perf_counter() - start
            times[context, batch].append((seconds, seconds * (before + now_read(values)) / 2))
    found = []
    for context, batch in points:
        ms, read_ = (statistics.median(column) for column in zip(*times[context, batch], strict=True))
        least = bytes_read(program.steps, runners[1].caches, [context - 1] * batch)
        point = {"context": context, "batch": batch, "ms": ms * 1e3, "bytes": least, "read": read_}
        found.append(point | {"gb_per_s": least / ms / 1e9})
    return found


def cache_share(points: list[dict[str, float]]) -> float:
    """How fast the longest context's cache was read, over and above the shortest's step, beside plain reads."""
    alone = [point for point in points if point["batch"] == 1]
    return (alone[-1]["bytes"] - alone[0]["bytes"]) / (alone[-1]["read"] - alone[0]["read"])


def plot(grown: dict[str, list[dict[str, float]]], path: str) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), layout="constrained")
    for axis, what, fixed in zip(axes, ("context", "batch"), ("batch", "context"), strict=True):
        for form, points in grown.items():
            mine = [p for p in points if p[fixed] == points[0][fixed]]
            axis.plot([p[what] for p in mine], [p["ms"] for p in mine], marker="o", markersize=3, label=form)
        axis.set(xlabel=what, ylabel="ms a step", ylim=(0, None))
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="taut,transformers,llama.cpp")
    parser.add_argument("--formats", default=",".join(FORMATS))
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--tokens", type=int, default=16)
    parser.add_argument("--growth", action="store_true")
    parser.add_argument("--json")
    parser.add_argument("--plot")
    options = parser.parse_args()
    torch.set_grad_enabled(False)
    weights, formats = random_weights(), options.formats.split(",")
    record: dict[str, Any] = {"cpu": cpu_name(), "threads": torch.get_num_threads(), "torch": torch.__version__}
    record |= {"python": platform.python_version(), "prompt": PROMPT}
    if options.growth:
        bandwidth = read_bandwidth(read_size(), seconds=0.5)
        record |= {"bandwidth": asdict(bandwidth), "growth": {f: growth(weights, f, options.rounds) for f in formats}}
        for form, points in record["growth"].items():
            for p in points:
                print(
                    f"{form} context {p['context']:5} batch {p['batch']:3} {p['ms']:7.2f} ms {p['gb_per_s']:6.1f} GB/s"
                )
            share = cache_share(points)
            print(f"{form}: the cache is read at {share:.0%} of a read beside it")
            record |= {f"cache_share_{form}": share}
        if options.plot:
            plot(record["growth"], options.plot)
    else:
        with tempfile.TemporaryDirectory() as folder:
            turns = players(weights, options.only.split(","), formats, Path(folder))
            check_parity(turns)
            rows, best = interleaved(turns, options.rounds, options.tokens)
        record |= {"bandwidth": best, "rows": [asdict(row) for row in rows]}
        print(f"{cpu_name()}, {torch.get_num_threads()} threads, read bandwidth {best / 1e9:.1f} GB/s")
        for row in rows:
            rates = f"{row.ms:7.2f} ms  {row.gb_per_s:6.1f} GB/s"
            print(f"{row.name:20} {rates}  slack {row.slack:.2f}  beside a read {row.beside:.2f}  {row.turns} turns")
    if options.json:
        Path(options.json).write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
