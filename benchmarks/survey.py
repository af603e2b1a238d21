"""Every architecture of the installed transformers: built tiny, traced, rewritten in both forms, and proved.

    python benchmarks/survey.py --record architectures.json --table docs/architectures.md

Results are kept class by class, so that a run that was cut short goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import logging
import signal
import time
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch
import transformers
from torch import fx
from transformers.models.auto import modeling_auto

from taut.facts.contraction import contraction
from taut.facts.moves import is_move
from taut.graph import Graph
from taut.lift import lift
from taut.ops.dyt import dyt
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.plans import plan_and_apply
from taut.proof import Evidence, prove
from taut.shrink import CannotShrink, example_inputs, tiny_model
from taut.tracing import CannotTrace, trace

MAPPINGS = {
    "causal LM": "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "masked LM": "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
    "encoder-decoder": "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "vision": "MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING_NAMES",
    "speech, CTC": "MODEL_FOR_CTC_MAPPING_NAMES",
    "speech to text": "MODEL_FOR_SPEECH_SEQ_2_SEQ_MAPPING_NAMES",
    "audio": "MODEL_FOR_AUDIO_CLASSIFICATION_MAPPING_NAMES",
    "base": "MODEL_MAPPING_NAMES",
}
SPARE = 16
LIMIT_S = 180
"""Processor seconds for one class."""


@dataclass
class Record:
    """What became of one class. `verdict` is "passed" only if sites were applied and proved in both forms."""

    name: str
    kind: str
    verdict: str = ""
    reason: str = ""
    norms: int = 0
    before_a_linear: int = 0
    applied: dict[str, dict[str, int]] = field(default_factory=dict)
    refused: dict[str, int] = field(default_factory=dict)
    float64_error: float = 0.0
    error_ratio: float = 0.0
    seconds: float = 0.0

    @property
    def counts(self) -> bool:
        """Whether the class is one with a norm in front of a linear layer, as far as can be known."""
        return self.before_a_linear > 0 or self.verdict in ("not traced", "error")


def classes() -> dict[str, str]:
    """Every class in the library's own mappings with its kind; the first kind where it is in several."""
    found: dict[str, str] = {}
    for kind, mapping in MAPPINGS.items():
        for names in getattr(modeling_auto, mapping).values():
            for name in [names] if isinstance(names, str) else names:
                if name and hasattr(transformers, name):
                    found.setdefault(name, kind)
    return found


def sample(each: int) -> dict[str, str]:
    """Some classes of each kind, always the same, spread over the library's list."""
    found: dict[str, str] = {}
    for kind in MAPPINGS:
        names = [name for name, of in classes().items() if of == kind]
        found |= dict.fromkeys(names[:: max(1, len(names) // each)][:each], kind)
    return found


def examine(name: str, kind: str, limit: float = LIMIT_S) -> Record:
    """Build, trace, rewrite and prove one class; whatever goes wrong is in the record."""
    record, began = Record(name, kind), time.process_time()
    try:
        with limited(limit):
            _examine(record)
    except CannotShrink as error:
        record.verdict, record.reason = "not built", str(error)
    except CannotTrace as error:
        record.verdict, record.reason = "not traced", str(error)
    except TooLong:
        record.verdict, record.reason = "error", f"took more than {limit:.0f} s"
    except Exception as error:
        record.verdict, record.reason = "error", f"{type(error).__name__}: {str(error)[:300]}"
    record.seconds = round(time.process_time() - began, 1)
    return record


def _examine(record: Record) -> None:
    model = tiny_model(getattr(transformers, record.name))
    inputs = example_inputs(model)
    raw = trace(model, inputs)
    lifted = lift(raw)
    norms = list(lifted.calls(rms_norm, layer_norm, dyt))
    record.norms, record.before_a_linear = len(norms), sum(_feeds_a_linear(norm) for norm in norms)
    reasons: Counter[str] = Counter()
    for form in ("stock", "taut"):
        plan, after = plan_and_apply(lifted, form)
        reasons.update(_gist(r.reason) for r in plan.refused if r.rewrite == "fold_norm" and form == "stock")
        record.applied[form] = {step.rewrite: len(step.sites) for step in plan.steps}
        if plan.applied:
            spare = (example_inputs(model, seed=seed) for seed in range(1, SPARE + 1))
            evidence = prove(raw, _as_written(raw, after, form), [inputs], spare=spare)
            _note(record, form, evidence)
    record.refused = dict(reasons.most_common())
    if not record.verdict:
        record.verdict = "passed" if any(record.applied.values()) else "nothing applies"


def _as_written(raw: Graph, after: Graph, form: str) -> Graph:
    if form == "taut":
        return after
    written = raw.copy()
    written.values = dict(after.values)
    return written


def _note(record: Record, form: str, evidence: Evidence) -> None:
    record.float64_error = max(record.float64_error, evidence.float64_error)
    record.error_ratio = max(record.error_ratio, evidence.error_ratio)
    if evidence.passed:
        return
    wrong = evidence.float64_error > 1e-12
    record.verdict = "failed" if wrong or not evidence.unproved else record.verdict or "unproved"
    said = f"off by {evidence.float64_error:.1e} at {evidence.worst}" if wrong else ""
    said = said or (f"never read: {', '.join(evidence.unproved[:3])}" if evidence.unproved else "")
    record.reason = f"{form}: {said or f'{evidence.error_ratio:.2f} times the rounding error at {evidence.worst}'}"


def _feeds_a_linear(norm: fx.Node) -> bool:
    """Whether a product with a parameter reads a norm's output, past movements."""
    todo, known = list(norm.users), {}
    while todo:
        node = todo.pop()
        product = contraction(node, known)
        if product is not None:
            return True
        if is_move(node):
            todo += node.users
    return False


def _gist(reason: str) -> str:
    """A refusal without the names of modules and parameters."""
    head = reason.split(" in ")[0].split(":")[0]
    words = ["a parameter" if "." in word else word for word in head.split()]
    return " ".join(words)


class TooLong(BaseException):
    pass


class limited:
    """Stops what is inside after some processor seconds."""

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds

    def __enter__(self) -> None:
        def stop(*_: object) -> None:
            raise TooLong

        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, self.seconds)

    def __exit__(self, *_: object) -> None:
        signal.setitimer(signal.ITIMER_PROF, 0)


def summary(records: list[Record]) -> str:
    """How many there are of each verdict, and the share that passes of those that count."""
    verdicts = Counter(r.verdict for r in records)
    counted = [r for r in records if r.counts]
    passed = sum(r.verdict == "passed" for r in counted)
    share = passed / len(counted) if counted else 0.0
    said = ", ".join(f"{n} {verdict}" for verdict, n in verdicts.most_common())
    before = f"With a norm in front of a linear layer: {passed} of {len(counted)} passed ({share:.0%})."
    return f"{len(records)} classes: {said}. {before}"


def table(records: list[Record]) -> str:
    """The records as a page of documentation."""
    lines = [
        "# Architectures",
        "",
        f"Every class in the model mappings of transformers {version('transformers')}, built tiny with random gains",
        "and biases, rewritten in both forms and proved in float64. Made by `python benchmarks/survey.py`.",
        "",
        summary(records),
        "",
        "| class | kind | norms | applied, stock form | applied, taut form | not folded because | verdict |",
        "|---|---|---|---|---|---|---|",
    ]
    return "\n".join([*lines, *(_row(r) for r in sorted(records, key=lambda r: (r.kind, r.name)))]) + "\n"


def _row(r: Record) -> str:
    stock, taut = (", ".join(f"{n} {v}" for n, v in r.applied.get(form, {}).items()) for form in ("stock", "taut"))
    refused = "; ".join(f"{reason} ({n})" for reason, n in r.refused.items())
    verdict = f"{r.verdict}: {r.reason}" if r.reason else r.verdict
    cells = (r.name, r.kind, str(r.norms), stock, taut, refused, verdict)
    return "| " + " | ".join(cell.replace("|", "\\|").replace("\n", " ") for cell in cells) + " |"


def run(
    wanted: dict[str, str], kept: Path | None = None, tell: Callable[[Record], None] = lambda _: None
) -> list[Record]:
    """Examine the classes, but for those whose records are kept already."""
    old = json.loads(kept.read_text()) if kept is not None and kept.exists() else []
    done = {record["name"]: Record(**record) for record in old}
    for name, kind in wanted.items():
        if name not in done:
            done[name] = examine(name, kind)
            tell(done[name])
            if kept is not None:
                kept.write_text(json.dumps([asdict(r) for r in done.values()], indent=1))
    return [done[name] for name in wanted]


def quiet() -> None:
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    logging.disable(logging.CRITICAL)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--record", type=Path, default=None, help="a JSON file that keeps the results")
    parser.add_argument("--table", type=Path, default=None, help="where to write the page")
    parser.add_argument("--only", nargs="+", default=None, help="class names")
    options = parser.parse_args()
    quiet()
    torch.set_num_threads(1)
    wanted = {n: k for n, k in classes().items() if options.only is None or n in options.only}
    tell = lambda r: print(r.name, r.verdict, r.applied, r.reason[:150], f"{r.seconds} s", flush=True)  # noqa: E731
    records = run(wanted, options.record, tell)
    print(summary(records))
    if options.table is not None:
        options.table.write_text(table(records))


if __name__ == "__main__":
    main()
