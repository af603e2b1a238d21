"""Is it still the same model? Three checks, none of which has a tolerance that somebody chose for a model.

1. Unrounded: in true float64 the rewritten graph equals the original for every promised output.
2. Written: every tensor is the one of check 1, rounded once, bit for bit.
3. Working dtype: the rewritten model is at most twice as far from the truth as the original model is.

A proof can be empty: an expert that no token reaches proves nothing. So every rewritten tensor, and every expert's
slice of it, must move the promised outputs; what does not is reported as unproved, and fails.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from taut.facts.contraction import name_of, uses
from taut.graph import Graph
from taut.ops.expert_linear import expert_linear
from taut.rewrite import Exactness

SAME_FUNCTION = 1e-12
"""Largest difference over largest value in float64 between two spellings of one function (DESIGN: ALGEBRAIC)."""

AS_GOOD = 2.0
"""How much farther from the truth than the original a rewritten model may be in its own dtype."""

Inputs = Mapping[str, Tensor]
DISCRETE = (torch.int64, torch.int32, torch.bool)
aten = torch.ops.aten
PICKS = (aten.topk.default, aten.sort.default)


@dataclass
class Evidence:
    """What was checked, against what, with what error."""

    passed: bool
    exactness: str
    float64_error: float
    error_ratio: float
    worst: str
    dtype: str = ""
    outputs: dict[str, str] = field(default_factory=dict)
    tensors_checked: int = 0
    unproved: list[str] = field(default_factory=list)
    wrong_tensors: list[str] = field(default_factory=list)
    choices_flipped: int = 0
    bounds: dict[str, float] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


@dataclass
class Comparison:
    """Errors of one run over all inputs: per output, and per node that both graphs have."""

    float64: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    first_off: str = ""
    flips: int = 0


def prove(
    before: Graph,
    after: Graph,
    inputs: Sequence[Inputs],
    *,
    promises: Mapping[str, str] | None = None,
    exactness: Exactness = Exactness.ALGEBRAIC,
    written: Mapping[str, Tensor] | None = None,
    bounds: Mapping[str, float] | None = None,
    spare: Iterable[Inputs] = (),
) -> Evidence:
    """Check that `after` computes what `before` does on every input.

    `promises` narrows an output to "argmax"; by default all values are promised. `written` are the rewritten tensors
    as they will be stored; without it they are rounded here. `bounds` are the measured bounds of BOUNDED rewrites.
    `spare` inputs are taken one by one while some rewritten tensor has not moved an output.
    """
    promises = promises or {}
    stored = dict(written) if written is not None else {n: after.evaluate(n, None) for n in after.changed()}
    wrong = [n for n in after.changed() if not torch.equal(_bits(stored[n]), _bits(after.evaluate(n, None)))]
    compared = Comparison()
    for example in inputs:
        _compare(before, after, example, stored, promises, compared)
    unproved = _unmoved(after, itertools.chain(inputs, spare))
    float64_error = max(compared.float64.values(), default=0.0)
    ratios = {k: compared.after[k] / compared.before[k] for k in compared.after}
    worst_output = max(compared.float64, key=compared.float64.__getitem__, default="")
    same = float64_error <= SAME_FUNCTION if exactness is Exactness.ALGEBRAIC else True
    error_ratio = max(ratios.values(), default=1.0)
    passed = same and error_ratio <= AS_GOOD and not unproved and not wrong
    return Evidence(
        passed=passed,
        exactness=exactness.name,
        float64_error=float64_error,
        error_ratio=error_ratio,
        worst=compared.first_off or worst_output,
        dtype=str(_working_dtype(before)).removeprefix("torch."),
        outputs={name: promises.get(name, "values") for name in before.outputs},
        tensors_checked=len(stored),
        unproved=unproved,
        wrong_tensors=wrong,
        choices_flipped=compared.flips,
        bounds=dict(bounds or {}),
    )


def _compare(before: Graph, after: Graph, example: Inputs, stored, promises, compared: Comparison) -> None:
    choices: dict[str, Tensor] = {}
    truth_at: dict[str, Tensor] = {}
    with torch.no_grad():
        truth = before.run(example, float64=True, watch=_remember(choices, truth_at))
        same = after.run(example, float64=True, watch=_first_off(truth_at, compared))
        pin = _pin(choices, compared)
        rough = before.run(example, watch=pin)
        kept = {n: stored.get(n, after.tensors.get(n)) for n in after.values}
        new = after.run(example, kept, watch=pin)
    for name, true in truth.items():
        if promises.get(name) == "argmax":
            equal = torch.equal(true.argmax(-1), same[name].argmax(-1))
            compared.float64[name] = max(compared.float64.get(name, 0.0), 0.0 if equal else 1.0)
            continue
        _keep_max(compared.float64, name, _largest(same[name], true))
        rounding = _frobenius(true.to(rough[name].dtype), true)
        _keep_max(compared.before, name, max(_frobenius(rough[name], true), rounding, torch.finfo(torch.float64).tiny))
        _keep_max(compared.after, name, _frobenius(new[name], true))
    if max(compared.float64.values(), default=0.0) <= SAME_FUNCTION:
        compared.first_off = ""


def _keep_max(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = max(errors.get(name, 0.0), error)


def _largest(one: Tensor, true: Tensor) -> float:
    """Largest difference over largest value; infinities (masks) must agree exactly."""
    finite = torch.isfinite(true)
    if not torch.equal(finite, torch.isfinite(one)):
        return float("inf")
    scale = true[finite].abs().max().item() if finite.any() else 0.0
    return (one[finite] - true[finite]).abs().max().item() / scale if scale else 0.0


def _frobenius(one: Tensor, true: Tensor) -> float:
    finite = torch.isfinite(true)
    if not bool(torch.isfinite(one[finite]).all()):
        return float("inf")
    norm = true[finite].norm().item()
    return (one[finite].double() - true[finite]).norm().item() / norm if norm else 0.0


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits, so that equality is of bits: -0.0 is not 0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def _working_dtype(graph: Graph) -> torch.dtype:
    floats = (graph.tensors[n].dtype for n in graph.values if graph.tensors[n].is_floating_point())
    return next(floats, torch.float32)


def _is_choice(node: fx.Node, value: Any) -> bool:
    """Whether a node makes something discrete of something continuous."""
    if node.op != "call_function" or not isinstance(value, Tensor) or value.dtype not in DISCRETE:
        return False
    sources = [n.meta.get("val") for n in node.all_input_nodes]
    return any(_continuous(source) for source in sources)


def _continuous(value: Any) -> bool:
    if isinstance(value, list | tuple):
        return any(_continuous(v) for v in value)
    return isinstance(value, Tensor) and value.is_floating_point()


def _remember(choices: dict[str, Tensor], truth_at: dict[str, Tensor]):
    def watch(node: fx.Node, value: Any, value_of: Any) -> Any:
        if node.target in PICKS:
            choices[node.name] = value[1]
        elif _is_choice(node, value):
            choices[node.name] = value
        elif isinstance(value, Tensor) and value.is_floating_point() and node.op == "call_function":
            truth_at[node.name] = value
        return value

    return watch


def _pin(choices: dict[str, Tensor], compared: Comparison):
    """Make the choices that float64 made, and count those that the working dtype would have made otherwise.

    A top-k also hands on the values it chose; they are taken anew from its input at the pinned places.
    """

    def watch(node: fx.Node, value: Any, value_of: Any) -> Any:
        pinned = choices.get(node.name)
        if pinned is None:
            return value
        if node.target in PICKS:
            compared.flips += int((pinned != value[1]).sum())
            return value_of(node.args[0]).gather(_picked_axis(node), pinned), pinned
        compared.flips += int((pinned != value).sum())
        return pinned

    return watch


def _picked_axis(node: fx.Node) -> int:
    given = node.kwargs.get("dim", (*node.args, None, None)[2 if node.target is aten.topk.default else 1])
    return -1 if given is None else given


def _first_off(truth_at: dict[str, Tensor], compared: Comparison):
    """Name the first product or sum whose value is no longer the original's: where a wrong rewrite shows first."""

    def watch(node: fx.Node, value: Any, value_of: Any) -> Any:
        true = truth_at.pop(node.name, None)
        if true is None or compared.first_off or not node.meta.get("where") or true.shape != value.shape:
            return value
        if name_of(node).startswith(("linear", "add", "matmul", "conv")) and _largest(value, true) > SAME_FUNCTION:
            compared.first_off = f"{node.name} in {node.meta['where']}"
        return value

    return watch


def _unmoved(after: Graph, inputs: Iterable[Inputs]) -> list[str]:
    """The rewritten tensors, or experts' slices of them, that no promised output depends on.

    A derivative says for all of them at once what perturbing one after the other would say.
    """
    changed = list(after.changed())
    if not changed:
        return []
    moved: dict[str, Tensor | None] = dict.fromkeys(changed)
    experts = _read_by_expert(after)
    for example in inputs:
        parameters = {n: after.evaluate(n) for n in after.values}
        leaves = {n: parameters[n].requires_grad_() for n in changed}
        with torch.enable_grad():
            results = after.run(example, parameters | leaves, float64=True)
            generator = torch.Generator().manual_seed(0)
            total = sum(_projection(r, generator) for r in results.values() if r.requires_grad)
            if not isinstance(total, Tensor):
                continue
            gradients = torch.autograd.grad(total, list(leaves.values()), allow_unused=True)
        for name, gradient in zip(changed, gradients, strict=True):
            if gradient is not None:
                slices = gradient.flatten(1) if name in experts else gradient.flatten()[None]
                hit = (slices != 0).any(1)
                moved[name] = hit if moved[name] is None else moved[name] | hit
        if all(hit is not None and bool(hit.all()) for hit in moved.values()):
            return []
    return [label for name, hit in moved.items() for label in _still(name, hit)]


def _projection(result: Tensor, generator: torch.Generator) -> Tensor:
    finite = torch.where(torch.isfinite(result), result, 0.0)
    return (finite * torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.device)).sum()


def _still(name: str, hit: Tensor | None) -> list[str]:
    if hit is None:
        return [name]
    if len(hit) == 1:
        return [] if bool(hit[0]) else [name]
    return [f"{name}[{i}]" for i in (~hit).nonzero().flatten().tolist()]


def _read_by_expert(graph: Graph) -> set[str]:
    found = set()
    for name, nodes in uses(graph).items():
        stacked = graph.tensors[name].ndim == 3 if name in graph.tensors else False
        grouped = any(n.target is expert_linear or "grouped_mm" in str(n.target) for n in nodes)
        if stacked and grouped:
            found.add(name)
    return found
