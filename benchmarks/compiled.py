"""Every causal language model of the installed transformers: built tiny, compiled, and held against itself.

    python benchmarks/compiled.py --record compiled.json --table docs/compiled.md [--only CLASS ...]

A class is in parity if the logits of an engine, teacher-forced over 40 tokens behind a prompt and one by one, are at
most twice as far from float64 as the model's own are. Results are kept class by class, so that a run that was cut
short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import time
from collections import Counter
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import survey
import torch
import transformers
from torch import Tensor, nn

import taut
from taut.checkpoint import BadInput
from taut.parity import TIMES, in_float64
from taut.shrink import CannotShrink, tiny_model

PROMPT, LENGTH = 20, 40
WORDS = {
    "in parity": "compiled, and in parity",
    "not in parity": "compiled, but not in parity",
    "refused": "exported, but refused",
    "not exported": "its step cannot be exported",
    "not built": "cannot be built tiny",
    "error": "failed without a reason of taut's own",
}


@dataclass
class Record:
    """What became of one class; `pieces` counts what torch runs, `ratio` is taut's error over the model's own."""

    name: str
    verdict: str = ""
    reason: str = ""
    pieces: int = 0
    ratio: float = 0.0
    seconds: float = 0.0
    without: list[str] = field(default_factory=list)
    """What the pieces are, without the places where they stand."""


def built(name: str) -> nn.Module:
    """A tiny model of a class, as a decoder where it may also be an encoder."""
    model_class = getattr(transformers, name)
    model = tiny_model(model_class)
    config = copy.deepcopy(model.config)
    if getattr(config, "is_decoder", None) is False:
        config.is_decoder = True
        model = tiny_model(model_class, config)
    if hasattr(model.config, "_experts_implementation"):
        model.set_experts_implementation("eager")  # the grouped products know no float64
    return model


def examine(name: str, limit: float) -> Record:
    record, began = Record(name), time.process_time()
    try:
        with survey.limited(limit):
            _examine(record)
    except CannotShrink as error:
        record.verdict, record.reason = "not built", str(error)
    except BadInput as error:
        record.reason = str(error).split(". ")[0] if "exported" in str(error) else str(error)
        record.verdict = "not exported" if "cannot be exported" in record.reason else "refused"
    except survey.TooLong:
        record.verdict, record.reason = "error", f"took more than {limit:.0f} s"
    except Exception as error:
        record.verdict, record.reason = "error", f"{type(error).__name__}: {error}"
    record.reason = re.sub(r"\s+", " ", record.reason)[:300]
    record.seconds = round(time.process_time() - began, 1)
    return record


@torch.no_grad()
def _examine(record: Record) -> None:
    model = built(record.name)
    engine = taut.compile(model, max_length=LENGTH)
    kinds = dict.fromkeys(why.split(" in ")[0].removeprefix("no word for ") for why in engine.explain())
    record.pieces, record.without = len(engine.explain()), list(kinds)
    vocabulary = model.config.get_text_config().vocab_size  # type: ignore[union-attr]
    ids = torch.randint(3, vocabulary, (LENGTH,), generator=torch.Generator().manual_seed(1))
    prompt, rest = ids[:PROMPT], ids[PROMPT:]
    own = model(input_ids=ids[None], use_cache=False).logits[0, PROMPT - 1 :]
    true = in_float64(model, prompt.tolist(), [*rest.tolist(), 0])
    found = [engine.prefill(prompt).clone(), *(engine.decode([int(token)])[0].clone() for token in rest)]
    error = _error(torch.stack(found), true)
    record.ratio = error / (_error(own, true) + torch.finfo(torch.float32).eps / TIMES)
    record.verdict = "in parity" if record.ratio <= TIMES else "not in parity"


def _error(logits: Tensor, true: Tensor) -> float:
    return float((logits.double() - true).norm() / true.norm())


def summary(records: list[Record]) -> str:
    counts = Counter(record.verdict for record in records)
    exported = sum(counts[verdict] for verdict in ("in parity", "not in parity", "refused"))
    said = ", ".join(f"{counts[verdict]} {words}" for verdict, words in WORDS.items() if counts[verdict])
    share = counts["in parity"] / max(exported, 1)
    return f"{len(records)} classes: {said}. Of those that can be exported {share:.0%} are compiled and in parity."


def table(records: list[Record]) -> str:
    """The records as a page of documentation."""
    lines = [
        "# What compiles",
        "",
        f"Every causal language model of transformers {version('transformers')}, built tiny with random weights,",
        f"compiled for a CPU and fed {LENGTH} tokens: a prompt of {PROMPT}, then one by one. In parity: at most",
        "twice the model's own error against float64 (the last column is that ratio). *Pieces* are parts of a step",
        "that torch runs between taut's own, as they have no word there. Made by `python benchmarks/compiled.py`.",
        "",
        summary(records),
        "",
        "| class | | pieces | what they are, or the reason | error ratio |",
        "|---|---|---|---|---|",
    ]
    order = list(WORDS)
    records = sorted(records, key=lambda record: (order.index(record.verdict), record.name))
    return "\n".join([*lines, *(_row(record) for record in records)]) + "\n"


def _row(r: Record) -> str:
    said = r.reason or "; ".join(r.without)
    ratio = f"{r.ratio:.2f}" if r.ratio else ""
    cells = (r.name, r.verdict, str(r.pieces or ""), said, ratio)
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def run(names: list[str], kept: Path | None, limit: float) -> list[Record]:
    """Examine the classes, but for those whose records are kept already."""
    old = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    done = {record["name"]: Record(**record) for record in old}
    for name in names:
        if name not in done:
            done[name] = record = examine(name, limit)
            print(record.name, record.verdict, record.reason, f"{record.seconds} s", flush=True)
            if kept is not None:
                kept.write_text(json.dumps([asdict(r) for r in done.values()], indent=1) + "\n")
    return [done[name] for name in names]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--record", type=Path, help="a JSON file that keeps the results")
    parser.add_argument("--table", type=Path, help="where to write the page")
    parser.add_argument("--only", nargs="+", help="class names")
    parser.add_argument("--limit", type=float, default=90.0, help="processor seconds for one class")
    options = parser.parse_args()
    survey.quiet()
    torch.set_num_threads(1)
    causal = [name for name, kind in survey.classes().items() if kind == "causal LM"]
    records = run(options.only or causal, options.record, options.limit)
    print(summary(records))
    if options.table is not None:
        options.table.write_text(table(records))


if __name__ == "__main__":
    main()
