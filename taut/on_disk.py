"""The main job on a checkpoint: plan from shapes, prove on a twin, stream the new tensors, and later verify them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut import __version__
from taut.checkpoint import BadInput, OutOfRange, write_checkpoint
from taut.checkpoint.atomic import check_target
from taut.checkpoint.changes import Change, disk_edits
from taut.graph import Graph, shape
from taut.lift import lift
from taut.lossy import prove_plan, text_inputs
from taut.opened import Opened, open_model
from taut.plans import SCHEMA, BadPlan, Plan, follow, plan_and_apply
from taut.proof import Evidence, NotProved, compare_modules, same_bits
from taut.rewrite import Exactness
from taut.twin import SPARE, exactness, promises, prove_on_twin
from taut.values import Filled, Original, Read, Scaled

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is done, and how much there is."""

FITS_IN_FLOAT64 = 200_000_000
"""Up to this many parameters the check that every tensor moves an output keeps all of them in memory."""

WARNING = (
    "LoRA adapters, draft heads and other weights trained on the original do not fit this checkpoint: "
    "the inputs of its linear layers are scaled differently."
)


@dataclass
class Applied:
    """What `apply` did: where the checkpoint is (None when nothing applied), the plan and the evidence."""

    out: str | None
    plan: Plan
    evidence: Evidence | None
    unused_tensors: list[str] = field(default_factory=list)
    left_out_files: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        applied = [{"rewrite": s.rewrite, "where": w} for s in self.plan.steps for w in s.sites]
        evidence = self.evidence.as_dict() if self.evidence else None
        shown = {"out": self.out, "applied": applied, "refused": [asdict(r) for r in self.plan.refused]}
        rest = {"absent": self.plan.absent, "unused_tensors": self.unused_tensors, "notes": self.notes}
        return shown | {"evidence": evidence, "left_out_files": self.left_out_files} | rest


def apply_checkpoint(
    opened: Opened,
    out: Path,
    plan: Plan | None,
    only: Iterable[str] | None,
    form: str,
    outputs: str,
    full: bool,
    force: bool,
    dtype: torch.dtype | None,
    text: Path | None,
    progress: Progress | None,
) -> Applied:
    """Write the rewritten checkpoint to `out`, or nothing where nothing applies.

    A site whose new values leave the dtype's range is refused, and the rest is planned anew.
    """
    check_target(opened.checkpoint.path, out, 0, force)
    while True:
        made, graph = _planned(opened, plan, only, form, outputs)
        if not made.steps:
            return Applied(None, made, None, notes=["nothing applies, so nothing was written"])
        try:
            return _write(opened, out, made, graph, full, force, dtype, text, progress)
        except OutOfRange as error:
            if plan is not None or not _refuse(opened, error):
                raise


def _planned(opened: Opened, plan: Plan | None, only, form: str, outputs: str) -> tuple[Plan, Graph]:
    if plan is None:
        return plan_and_apply(lift(opened.writable_graph(outputs)), form, only, outputs)
    return plan, follow(lift(opened.writable_graph(plan.outputs, known=False)), plan)


def _refuse(opened: Opened, error: OutOfRange) -> bool:
    """Mark the parameters that live in the tensors named; False if none is new."""
    reasons = {}
    for name, pieces in opened.located.items():
        for piece in pieces:
            if piece.tensor in error.tensors and name not in opened.refused:
                reasons[name] = f"folded, {name} leaves its dtype's normal range: {error.tensors[piece.tensor]}"
    opened.refused |= reasons
    return bool(reasons)


def _write(opened, out, plan, graph, full, force, dtype, text, progress) -> Applied:
    working = dtype or opened.dtype
    evidence = prove_on_twin(opened.model_class, opened.config, plan, working)
    if not evidence.passed:
        raise NotProved("the plan could not be proved on a shrunk twin of this model", evidence)
    if full:
        evidence = prove_full(opened, None, plan, dtype, text, progress)
        evidence.notes.append("proved on the full-size model")
        if not evidence.passed:
            raise NotProved("the plan could not be proved on the full-size model", evidence)
    if plan.form == "taut":
        from taut.tautform import write_graph

        write_graph(opened, out, plan, graph, record_of(opened, plan, evidence), force, _bytes_progress(progress))
    else:
        changed = {name: change(graph, name, opened.located.read) for name in graph.changed()}
        edits, extra = disk_edits(opened.located, changed)
        changes = {"tie_word_embeddings": False} if extra else {}
        write_checkpoint(
            opened.checkpoint,
            out,
            edits,
            record=record_of(opened, plan, evidence),
            extra_tensors=extra,
            config_changes=changes,
            may_be_nonfinite=opened.located.unused,
            force=force,
            progress=_bytes_progress(progress),
        )
    checkpoint, located = opened.checkpoint, opened.located
    return Applied(str(out), plan, evidence, located.unused, checkpoint.skipped_weights(), [WARNING])


def change(graph: Graph, name: str, read: Read) -> Change:
    """A parameter's new value as the checkpoint writer takes it, with the hints by which it streams fast."""
    value = graph.values[name]

    if isinstance(value, Filled):
        return Change(value.evaluate, fill=value.value)
    if isinstance(value, Scaled) and value.x == Original(name):
        return Change(value.evaluate, scale=(value.axis, value.by.evaluate(read)))
    return Change(value.evaluate)


def record_of(opened: Opened, plan: Plan, evidence: Evidence) -> dict[str, Any]:
    """What stays with the checkpoint: nothing of when or where, so that the same input gives the same bytes."""
    return {
        "schema": SCHEMA,
        "taut": __version__,
        "plan": plan.as_dict(),
        "evidence": evidence.as_dict(),
        "untied": opened.untied,
        "warning": WARNING,
    }


def _bytes_progress(progress: Progress | None) -> Callable[[int, int], None] | None:
    return None if progress is None else lambda done, total: progress("writing", done, total)


def verify_checkpoints(
    before: str | Path,
    after: str | Path,
    revision: str | None,
    trust_remote_code: bool,
    dtype: torch.dtype | None,
    text: Path | None,
    progress: Progress | None,
) -> Evidence:
    """Replay AFTER's recorded plan on BEFORE and check all three; without a record, only compare the outputs."""
    new = open_model(after, None, trust_remote_code)
    record = new.checkpoint.prior.record
    if record is None:
        return _compare(open_model(before, revision, trust_remote_code), new)
    try:
        plan = Plan.from_dict(record["plan"])
    except (KeyError, TypeError, BadPlan) as error:
        raise BadInput(f"{after}: taut.json holds no plan: {error}", "apply taut to the original again") from error
    old = open_model(before, revision, trust_remote_code, untie=bool(record.get("untied")))
    return prove_full(old, new, plan, dtype, text, progress)


def prove_full(
    old: Opened,
    new: Opened | None,
    plan: Plan,
    dtype: torch.dtype | None,
    text: Path | None,
    progress: Progress | None,
) -> Evidence:
    """The proof on the model itself. `new` is what was written; without it, what would be.

    What a lossy plan costs is measured on `text`, by default on the one that comes with taut.
    """
    lossy = exactness(plan) is Exactness.BOUNDED
    if text is not None and not lossy:
        raise BadInput("a text is what lossy rewrites are measured on, and none is applied", "leave --text out")
    told = text_inputs(old, text) if lossy else []
    raw = old.full_graph(plan.outputs, dtype, example=told[0] if told else None)
    lifted = lift(raw)
    try:
        written = _Written(new, follow(lifted, plan)) if new is not None else None
    except BadPlan as error:
        cause = f"the recorded plan does not fit {old.checkpoint.path}: {error}"
        raise BadInput(cause, "compare the right pair") from error
    small = sum(raw.tensors[name].numel() for name in raw.values) <= FITS_IN_FLOAT64
    if progress is not None:
        progress("proving", 0, 1)
    evidence, after = prove_plan(
        raw,
        lifted,
        plan,
        told[:1] or [old.inputs(0)],
        written=written,
        promises=promises(plan, raw.outputs),
        exactness=exactness(plan),
        spare=[] if told else (old.inputs(seed) for seed in range(1, SPARE + 1)),
        movement=small,
        noise=small,
        text=told,
    )
    if not small:
        evidence.notes.append("that every tensor moves an output was proved on a shrunk twin")
    if lossy and not told:
        evidence.notes.append("there is no tokenizer, so no perplexity was measured")
    if new is not None:
        strangers = [name for name in _differing(old, new, after) if name not in after.changed()]
        evidence.wrong_tensors += strangers
        evidence.passed = evidence.passed and not strangers
    return evidence


class _Written(Mapping[str, Tensor]):
    """The rewritten parameters as they stand in a written checkpoint, read when asked for."""

    def __init__(self, new: Opened, graph: Graph) -> None:
        self.new, self.graph, self.names = new, graph, list(graph.changed())

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.names:
            raise KeyError(name)
        tensor, expected = self.new.read(name), shape(self.graph.placeholders("parameter")[name])
        if tensor.shape != expected:
            cause = f"{self.new.checkpoint.path}: {name} has shape {tuple(tensor.shape)}, not {tuple(expected)}"
            raise BadInput(cause, "apply taut to the original again")
        return tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self.names)


def _differing(old: Opened, new: Opened, after: Graph) -> list[str]:
    """What should not have changed and has: parameters that the plan leaves alone, and tensors that nothing reads."""
    alone = [name for name in after.values if name not in after.changed()]
    wrong = [name for name in alone if not same_bits(old.located.read(name), new.read(name))]
    kept = [name for name in old.located.unused if name in new.checkpoint.tensors]
    return wrong + [n for n in kept if not same_bits(old.checkpoint.read(n), new.checkpoint.read(n))]


def _compare(old: Opened, new: Opened) -> Evidence:
    _ = old.located, new.located  # They refuse missing tensors, which transformers would make up.
    classes: Any = old.model_class, new.model_class
    before = classes[0].from_pretrained(old.checkpoint.path, dtype="auto").eval()
    after = classes[1].from_pretrained(new.checkpoint.path, dtype="auto").eval()
    return compare_modules(before, after, old.inputs(0))
