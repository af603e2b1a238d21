"""Train the two demo models that taut ships, from the source text of permissively licensed Python packages.

    python benchmarks/train_demo.py                 # everything, from the download to the checkpoints
    python benchmarks/train_demo.py --prepare       # stop when the texts are ready (needs a network, no GPU)

Stages, each skipped where its result is already in the work folder: download the pinned wheels and check their
licences, assemble the corpus, train the tokenizer. Then encode and, per model: train, evaluate on packages that were
held out, export in bf16 with a model card. Both models read the same tokens, no run more than twice.
"""

from __future__ import annotations

import argparse
import email
import json
import lzma
import math
import random
import re
import shutil
import subprocess
import sys
import sysconfig
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import LambdaLR
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedModel, PreTrainedTokenizerFast

PACKAGES = """
aiohttp==3.14.5 anyio==4.16.0 apache-airflow-core==3.3.2 apache-beam==2.77.0 astropy==8.0.2 babel==2.18.0
black==26.10.1 bokeh==3.10.2 boto3==1.44.5 celery==5.7.0 cinder==29.0.0 cirq-core==1.7.0 conan==2.34.0 cvxpy==1.9.3
dash==4.4.1 dask==2026.8.0 datasets==5.2.0 diffusers==0.42.1 distributed==2026.8.0 django==6.1.3 fastapi==0.165.0
flax==0.12.12 fsspec==2026.9.0 glance==33.0.0 gradio==6.31.0 h5py==3.16.0 heat==1.9.0 homeassistant==2025.1.4
ipython==9.18.1 ironic==39.0.0 jax==0.12.0.1 jinja2==3.1.6 keras==3.15.1 keystone==30.0.0 langchain==1.5.0
langchain-community==0.4.2 lightning==2.6.6 llama-index-core==0.14.25 manila==23.0.1 matplotlib==3.11.2
mlflow==3.18.0 mpmath==1.4.1 mypy==2.4.1 networkx==3.7 neutron==29.0.0 nltk==3.10.4 nova==34.0.0 numba==0.68.1
numpy==2.5.5 optax==0.2.8 pandas==3.1.1 pennylane==0.45.1 poetry==2.5.1 pydantic==2.14.3 pygments==2.21.0
pymatgen==2026.10.24 pyomo==6.10.1 pyscf==2.14.0 pytest==9.2.0 qiskit==2.6.2 ray==2.60.0 requests==2.34.2
scikit-image==0.26.0 scikit-learn==1.9.1 scipy==1.18.1 scrapy==2.19.0 spacy==3.8.18 sphinx==9.1.1
sqlalchemy==2.1.9 starlette==1.10.0 statsmodels==0.15.0 streamlit==1.67.0 sunpy==8.0.1 swift==2.38.3 sympy==1.14.0
tempest==47.0.0 timm==1.0.31 torchvision==0.29.2 tornado==6.6.1 transformers==5.23.0 twisted==26.10.0 urllib3==2.8.0
wagtail==8.0.1 xarray==2026.9.0
"""
HELD_OUT = "attrs==26.1.0 click==8.5.1 flask==3.1.3 httpx==0.28.1 rich==15.0.0 trio==0.35.0 werkzeug==3.1.9 zarr==3.4.2"
EXCERPT = ("attrs", "attr/converters.py")
PROMPT = 'import numpy as np\n\n\ndef normalize(x, axis=-1):\n    """'
TEMPERATURE = 0.7
WHEELS = """--no-deps --only-binary=:all: --python-version 3.12 --implementation cp --abi cp312 --abi abi3 --abi none
--platform any --platform manylinux2014_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux_2_27_x86_64
--platform manylinux_2_28_x86_64"""

PERMITTED = re.compile(r"MIT|BSD|Apache|Python Software Foundation|PSF")
FORBIDDEN = re.compile(r"GPL|GNU|Mozilla|MPL|EUPL|Eclipse|Proprietary|Commons", re.I)
FORBIDDEN_HEADER = re.compile(r"GNU (Lesser |Library |Affero )?General Public|\b[AL]?GPL|Mozilla Public")
PER_PACKAGE, SEED = 4_500_000, 0

END = "<|endoftext|>"
VOCABULARY = 3072
# A newline keeps the indentation after it, and an identifier one mark before it: Python in few tokens.
PIECES = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s*\n[ \t]*|[ \t]+(?!\S)|\s+"

COMMON = {
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
LLAMA = {"hidden_size": 192, "intermediate_size": 576, "num_hidden_layers": 6, "num_attention_heads": 6,
         "num_key_value_heads": 2, "max_position_embeddings": 1024, "rms_norm_eps": 1e-5}  # fmt: skip
GPT2 = {"n_embd": 128, "n_layer": 5, "n_head": 4, "n_positions": 512,
        "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}  # fmt: skip
MODELS = {"model": LlamaConfig(**LLAMA, **COMMON), "layernorm": GPT2Config(**GPT2, **COMMON)}
TOKENS_PER_STEP = 32_768
PASSES = 2
MUON_LR, ADAM_LR = 0.02, 4e-3


def download(work: Path) -> Path:
    """The pinned wheels, in `work/wheels`."""
    if not (wheels := work / "wheels").exists():
        pip = [sys.executable, "-m", "pip", "download", "-q", *WHEELS.split(), "-d", str(wheels)]
        subprocess.run([*pip, *PACKAGES.split(), *HELD_OUT.split()], check=True)
    return wheels


def licence(metadata: str) -> str:
    """The licence that a package's metadata declares. Raises ValueError where it is not a permissive one."""
    fields = email.message_from_string(metadata)
    declared = [fields.get("License-Expression", "")]
    declared += [c.rpartition(" :: ")[2] for c in fields.get_all("Classifier", []) if c.startswith("License ::")]
    declared += [(fields.get("License") or "").strip().partition("\n")[0][:60]]
    text = next((d for d in declared if PERMITTED.search(d)), "")
    if not text or any(FORBIDDEN.search(d) for d in declared):
        raise ValueError(f"{fields['Name']} declares {declared}: not a licence that permits training on its text")
    return text


def readable(data: bytes) -> str | None:
    """A source file without its leading comment block, or None where it is a table, a stub or not permissive."""
    try:
        text = (data := data.replace(b"\r\n", b"\n")).decode()
    except UnicodeDecodeError:
        return None
    if not 200 <= len(text) <= 200_000 or len(data) > 1.05 * len(text):
        return None
    return None if FORBIDDEN_HEADER.search(text[:4000]) else re.sub(r"\A(#.*\n|\s*\n)+", "", text)


def wheel_sources(path: Path) -> tuple[dict[str, str], dict[str, str]]:
    """Name, version and licence of a wheel, and its source files by name."""
    with zipfile.ZipFile(path) as wheel:
        names = sorted(wheel.namelist())
        metadata = wheel.read(next(n for n in names if re.fullmatch(r"[^/]+\.dist-info/METADATA", n))).decode()
        texts = {n: readable(wheel.read(n)) for n in names if n.endswith((".py", ".pyx"))}
    fields = email.message_from_string(metadata)
    facts = {"name": fields["Name"].lower(), "version": fields["Version"], "licence": licence(metadata)}
    return facts, {n: text for n, text in texts.items() if text}


def standard_library() -> tuple[dict[str, str], dict[str, str]]:
    """The same for the running Python's standard library."""
    root = Path(sysconfig.get_path("stdlib"))
    paths = [p for p in sorted(root.rglob("*.py")) if "site-packages" not in p.parts]
    texts = {str(p.relative_to(root)): readable(p.read_bytes()) for p in paths}
    facts = {"name": "cpython", "version": sys.version.split()[0], "licence": "PSF-2.0"}
    return facts, {n: text for n, text in texts.items() if text}


def long_lines(text: str) -> set[int]:
    return {hash(line) for line in map(str.strip, text.splitlines()) if len(line) >= 30}


def assemble(work: Path) -> tuple[list[str], list[str]]:
    """Training files and held-out files. Writes `data.json`, the record of what was read.

    A training file goes where its text was seen before, or where a third of its long lines occur in a held-out
    package (a vendored copy).
    """
    held_names = {pin.partition("==")[0] for pin in HELD_OUT.split()}
    sources = [wheel_sources(path) for path in sorted(download(work).glob("*.whl"))] + [standard_library()]
    sources.sort(key=lambda source: source[0]["name"] not in held_names)
    seen, held_lines, train, held, record = set(), set(), [], [], []
    for facts, texts in sources:
        is_held = facts["name"] in held_names
        kept, size = [], 0
        for text in random.Random(SEED).sample(list(texts.values()), len(texts)):
            if text in seen or size + len(text.encode()) > PER_PACKAGE:
                continue
            lines = long_lines(text)
            if not is_held and len(lines & held_lines) > len(lines) / 3:
                continue
            seen.add(text)
            kept.append(text)
            size += len(text.encode())
            held_lines |= lines if is_held else set()
        (held if is_held else train).extend(kept)
        record.append({**facts, "files": len(kept), "bytes": size, "held_out": is_held})
    random.Random(SEED).shuffle(train)
    sizes = {is_held: sum(r["bytes"] for r in record if r["held_out"] == is_held) for is_held in (False, True)}
    totals = {"train_bytes": sizes[False], "held_out_bytes": sizes[True]}
    rows = ",\n".join(map(json.dumps, sorted(record, key=lambda row: row["name"])))
    (work / "data.json").write_text(f'{{"totals": {json.dumps(totals)}, "packages": [\n{rows}\n]}}\n')
    return train, held


def write_excerpt(work: Path) -> None:
    """The held-out file that is shipped, `heldout.txt`, and its licence, `heldout.LICENSE`."""
    with zipfile.ZipFile(next(download(work).glob(f"{EXCERPT[0]}-*.whl"))) as wheel:
        (work / "heldout.txt").write_bytes(wheel.read(EXCERPT[1]))
        terms = next(n for n in wheel.namelist() if n.endswith("/LICENSE"))
        (work / "heldout.LICENSE").write_bytes(wheel.read(terms))


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE, without a normaliser: decoding returns the bytes that went in."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    as_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([pre_tokenizers.Split(Regex(PIECES), "isolated"), as_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=VOCABULARY, special_tokens=[END], initial_alphabet=as_bytes.alphabet())
    tokenizer.train_from_iterator(texts, trainer)
    options = {"bos_token": END, "eos_token": END, "pad_token": END, "clean_up_tokenization_spaces": False}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **options)


def save_texts(texts: list[str], path: Path) -> None:
    """Compressed, a NUL between files: no Python source holds one."""
    with lzma.open(path.with_suffix(".partial"), "wt", preset=1, encoding="utf-8", newline="") as out:
        out.write("\0".join(texts))
    path.with_suffix(".partial").rename(path)


def prepare(work: Path) -> None:
    """Everything before training: the excerpt, `data.json`, `tokenizer/`, `heldout.xz` and `train.xz`."""
    if (work / "train.xz").exists():
        return
    work.mkdir(parents=True, exist_ok=True)
    write_excerpt(work)
    train, held = assemble(work)
    train_tokenizer(train[::10]).save_pretrained(work / "tokenizer")
    compact = work / "tokenizer" / "tokenizer.json"
    compact.write_text(json.dumps(json.loads(compact.read_text()), ensure_ascii=False, separators=(",", ":")))
    save_texts(held, work / "heldout.xz")
    save_texts(train, work / "train.xz")


def encode(path: Path, device: torch.device, limit: float = math.inf) -> Tensor:
    """The texts in `path` as one stream of tokens, [n] int32, each text after an end-of-text token. It stops after the
    text that brings it to `limit` tokens."""
    tokenizer = PreTrainedTokenizerFast.from_pretrained(path.parent / "tokenizer")
    with lzma.open(path, "rt", encoding="utf-8", newline="") as file:
        texts = file.read().split("\0")
    parts, count = [], 0
    for start in range(0, len(texts), 2000):
        if count >= limit:
            break
        rows = tokenizer(texts[start : start + 2000], return_attention_mask=False)["input_ids"]
        parts += [np.array([0, *ids], dtype=np.int32) for ids in rows]
        count += sum(len(ids) + 1 for ids in rows)
    return torch.from_numpy(np.concatenate(parts)).to(device)


def batches(tokens: Tensor, context: int, count: int) -> Iterator[Tensor]:
    """`PASSES` passes over the tokens in random order, as [count, context + 1] windows."""
    rng = torch.Generator().manual_seed(SEED)
    span = torch.arange(context + 1, device=tokens.device)
    for _ in range(PASSES):
        offset = int(torch.randint(context, (), generator=rng))
        starts = torch.randperm((len(tokens) - offset - 1) // context, generator=rng) * context + offset
        for chunk in starts.to(tokens.device).split(count):
            if len(chunk) == count:
                yield tokens[chunk[:, None] + span].long()


def loss_of(model: nn.Module, window: Tensor, reduction: str = "mean") -> Tensor:
    logits = model(input_ids=window[:, :-1], use_cache=False).logits
    return nn.functional.cross_entropy(logits.float().flatten(0, 1), window[:, 1:].flatten(), reduction=reduction)


def optimizers(model: PreTrainedModel) -> list[torch.optim.Optimizer]:
    """Muon for the layers' matrices, AdamW for the rest. Nothing pulls a gain or a bias to a set value."""
    named = [(p.ndim == 2 and bool(re.search(r"\.(layers|h)\.\d", name)), p) for name, p in model.named_parameters()]
    matrices, others = [p for inner, p in named if inner], [p for inner, p in named if not inner]
    muon = torch.optim.Muon(matrices, lr=MUON_LR, weight_decay=0.01, momentum=0.95)
    return [muon, torch.optim.AdamW(others, lr=ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0, fused=True)]


def train(config: LlamaConfig | GPT2Config, tokens: Tensor, steps: int | None) -> tuple[PreTrainedModel, dict]:
    """A trained model in float32, and the record of its training."""
    torch.manual_seed(SEED)
    context = config.max_position_embeddings
    model = AutoModelForCausalLM.from_config(config).to(tokens.device).train()
    on_gpu = tokens.device.type == "cuda"
    run = torch.compile(model) if on_gpu else model
    count = TOKENS_PER_STEP // context
    total = steps or PASSES * (len(tokens) // context // count) - 1
    opts, curve, started = optimizers(model), [], time.perf_counter()
    cosine = lambda step: min(1, (step + 1) / (0.02 * total)) * (1 + math.cos(math.pi * step / total)) / 2  # noqa: E731
    schedules = [LambdaLR(opt, cosine) for opt in opts]
    for step, window in zip(range(total), batches(tokens, context, count), strict=False):
        with torch.autocast(tokens.device.type, dtype=torch.bfloat16, enabled=on_gpu):
            loss = loss_of(run, window)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for opt, schedule in zip(opts, schedules, strict=True):
            opt.step()
            opt.zero_grad()
            schedule.step()
        if step % max(1, total // 100) == 0 or step == total - 1:
            curve.append([step, round(loss.item(), 4)])
            print(f"step {step}/{total} loss {curve[-1][1]} {time.perf_counter() - started:.0f} s", file=sys.stderr)
    seconds, seen = round(time.perf_counter() - started, 1), total * count * context
    record = {"parameters": sum(p.numel() for p in model.parameters()), "train_tokens": len(tokens),
              "tokens_seen": seen, "passes": round(seen / len(tokens), 3), "steps": total,
              "tokens_per_step": count * context, "context": context, "muon_lr": MUON_LR, "adamw_lr": ADAM_LR,
              "device": torch.cuda.get_device_name() if on_gpu else "cpu", "seconds": seconds,
              "torch": torch.__version__, "loss_curve": curve}  # fmt: skip
    return model, record


@torch.no_grad()
def evaluate(model: PreTrainedModel, tokens: Tensor, text_bytes: int) -> dict[str, float]:
    """Perplexity and bits per byte in float32, over full-context windows that overlap by one token."""
    context = model.config.max_position_embeddings
    whole = (len(tokens) - 1) // context
    windows = [*tokens.unfold(0, context + 1, context).split(64)] if whole else []
    windows += [tokens[None, whole * context :]] if len(tokens) - 1 > whole * context else []
    total = sum(loss_of(model, window.long(), "sum").double() for window in windows)
    loss, bits = float(total) / (len(tokens) - 1), float(total) / math.log(2) / text_bytes
    return {"perplexity": round(math.exp(loss), 4), "bits_per_byte": round(bits, 4), "tokens": len(tokens)}


def export(model: PreTrainedModel, record: dict, work: Path, folder: Path) -> dict:
    """Write the checkpoint in bf16, then measure what was written, as stock transformers loads it."""
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(work / "tokenizer")
    shutil.copytree(work / "tokenizer", folder, dirs_exist_ok=True)
    shutil.copy(Path(__file__).parents[1] / "LICENSE", folder)
    totals = json.loads((work / "data.json").read_text())["totals"]
    written = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    excerpt = (work / "heldout.txt").read_text()
    record["excerpt"] = evaluate(written, torch.tensor([0, *tokenizer(excerpt)["input_ids"]]), len(excerpt.encode()))
    torch.manual_seed(SEED)
    drawing = {"max_new_tokens": 100, "do_sample": True, "temperature": TEMPERATURE}
    record["sample"] = tokenizer.decode(written.generate(**tokenizer(PROMPT, return_tensors="pt"), **drawing)[0])
    held = encode(work / "heldout.xz", model.device)
    record["held_out"] = evaluate(written.to(model.device), held, totals["held_out_bytes"])
    return record


def card(name: str, config: LlamaConfig | GPT2Config, record: dict, data: dict) -> str:
    """The model card, every figure of it taken from the records."""
    packages = [p for p in data["packages"] if not p["held_out"]]
    held = ", ".join(f"{p['name']} {p['version']}" for p in data["packages"] if p["held_out"])
    kind = {"llama": "Llama: RMSNorm, grouped-query attention, SwiGLU, RoPE", "gpt2": "GPT-2: LayerNorm and biases"}
    licences = ", ".join(sorted({p["licence"] for p in data["packages"]}))
    return f"""---
license: mit
library_name: transformers
---

# taut demo: `{name}`

A small language model of Python source, for showing taut's rewrites on real weights. It writes plausible code, repeats itself and knows nothing.
{kind[config.model_type]}. {record["parameters"]:,} parameters in bf16, input and output embeddings untied, context {record["context"]}, byte-level BPE of {VOCABULARY:,} tokens.
Gains (and biases, where there are any) are as trained: started at one (zero), never set by hand.

| | tokens | perplexity | bits per byte |
|---|---|---|---|
| held-out packages | {record["held_out"]["tokens"]:,} | {record["held_out"]["perplexity"]} | {record["held_out"]["bits_per_byte"]} |
| `heldout.txt` | {record["excerpt"]["tokens"]:,} | {record["excerpt"]["perplexity"]} | {record["excerpt"]["bits_per_byte"]} |

Both in float32 on the bf16 weights; each file after `{END}`, windows of {record["context"]} tokens that overlap by one.
Held out: {held}. `heldout.txt` is `{EXCERPT[1]}` of {EXCERPT[0]}, whose licence is in `heldout.LICENSE`.

Its continuation of {len(PROMPT.splitlines())} lines, at temperature {TEMPERATURE} with seed {SEED}:

```python
{record["sample"]}
```

## Training

`python benchmarks/train_demo.py`: {record["steps"]:,} steps of {record["tokens_per_step"]:,} tokens, {record["passes"]} passes over {record["train_tokens"]:,} tokens, {record["seconds"]} s on one {record["device"]} (compilation included).
Muon for the layers' matrices and AdamW for the rest, cosine schedule, bf16 autocast. The loss curve is in `training.json`.

## Data and licences

{data["totals"]["train_bytes"] / 1e6:.0f} MB of source text of {len(packages)} projects, files deduplicated, leading comment blocks removed, at most {PER_PACKAGE / 1e6:.1f} MB a project.
`data.json` lists each with its version, licence and bytes. The licences, as declared: {licences}.
Files whose header names a GPL or the MPL were left out. The weights are released under the MIT licence.
"""  # noqa: E501


def plot(curves: dict[str, list], path: Path) -> None:
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(6, 3.2), layout="constrained")
    for name, curve in curves.items():
        axes.plot(*zip(*curve, strict=True), label=name, linewidth=1)
    axes.set(xlabel="step", ylabel="training loss (nats per token)", ylim=(1, 6))
    axes.legend(frameon=False)
    figure.savefig(path, dpi=110)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path(".demo"), help="downloads and prepared texts")
    parser.add_argument("--out", type=Path, default=Path("taut/demo"), help="where the checkpoints go")
    parser.add_argument("--plot", type=Path, default=Path("docs/demo_training.png"))
    parser.add_argument("--prepare", action="store_true", help="stop before training")
    parser.add_argument("--steps", type=int, help="stop early, to try the script out")
    args = parser.parse_args()
    prepare(args.work)
    if args.prepare:
        return
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokens = encode(args.work / "train.xz", device)
    data, curves = json.loads((args.work / "data.json").read_text()), {}
    for name, config in MODELS.items():
        model, record = train(config, tokens, args.steps)
        record = export(model, record, args.work, args.out / name)
        curves[f"{config.model_type} ({record['parameters'] / 1e6:.1f} M)"] = record["loss_curve"]
        (args.out / name / "README.md").write_text(card(name, config, record, data))
        (args.out / name / "training.json").write_text(json.dumps(record) + "\n")
        print(json.dumps({"model": name, **{k: record[k] for k in ("held_out", "excerpt", "sample")}}), flush=True)
    for file in ("data.json", "heldout.txt", "heldout.LICENSE"):
        shutil.copy(args.work / file, args.out)
    plot(curves, args.plot)


if __name__ == "__main__":
    main()
