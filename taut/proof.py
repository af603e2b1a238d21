"""Is it still the same model? Three checks, none of which has a tolerance that somebody chose for a model.

1. Unrounded: in true float64 the rewritten graph equals the original for every promised output.
2. Written: every tensor is the one of check 1, rounded once, bit for bit.
3. Working dtype: the rewritten model is at most twice as far from the truth as the original model is.

A proof can be empty: an expert that no token reaches proves nothing. So every rewritten tensor, and every expert's
slice of it, must move the promised outputs; what does not is reported as unproved, and fails.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from taut.checkpoint.errors import BadInput
from taut.facts.contraction import name_of, uses
from taut.graph import Graph
from taut.ops.expert_linear import expert_linear
from taut.rewrite import Exactness
from taut.tracing import named_tensors, reason

SAME_FUNCTION = 1e-12
"""Largest difference over largest value in float64 between two spellings of one function (DESIGN: ALGEBRAIC)."""

AS_GOOD = 2.0
"""How much farther from the truth than the original a rewritten model may be in its own dtype."""

ENOUGH = 64
"""So many values of an output are compared at least: the ratio of two errors of a few numbers is chance."""

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


class NotProved(Exception):
    """The proof failed; `evidence` says where."""

    def __init__(self, cause: str, evidence: Evidence) -> None:
        details = [f"{name} unproved" for name in evidence.unproved] + evidence.notes
        if evidence.worst and not evidence.float64_error <= SAME_FUNCTION:
            details.insert(0, f"off by {evidence.float64_error:.1e} at {evidence.worst}")
        super().__init__(": ".join([cause, "; ".join(details)]) if details else cause)
        self.evidence = evidence


@dataclass
class Comparison:
    """Errors over all inputs, per output: the largest in float64, and the summed squares in the working dtype."""

    values: dict[str, int] = field(default_factory=dict)
    largest: dict[str, float] = field(default_factory=dict)
    off: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    after: dict[str, float] = field(default_factory=dict)
    first_off: str = ""
    flips: int = 0

    @property
    def float64(self) -> dict[str, float]:
        """Largest difference over largest value; where every value is zero, the difference itself."""
        return {k: off / (self.largest[k] or 1.0) for k, off in self.off.items()}


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
    movement: bool = True,
) -> Evidence:
    """Check that `after` computes what `before` does on every input.

    `promises` narrows an output to "argmax"; by default all values are promised. `written` are the rewritten tensors
    as they will be stored; without it they are rounded here. `bounds` are the measured bounds of BOUNDED rewrites.
    `spare` inputs are taken one by one while an output has too few values to compare errors, or while some rewritten
    tensor has not moved an output; `movement=False` leaves that check out, for a model that does not fit in float64
    and has been proved to move on its twin.
    """
    promises = promises or {}
    changed = list(after.changed())
    stored = written if written is not None else _AsWritten(after)
    wrong = [] if written is None else [n for n in changed if not same_bits(stored[n], after.evaluate(n, None))]
    more, spare = itertools.tee(spare)
    compared = _compared(before, after, inputs, more, stored, promises)
    unproved = _unmoved(after, itertools.chain(inputs, spare)) if movement else []
    float64_error = max(compared.float64.values(), default=0.0)
    ratios = {k: math.sqrt(compared.after[k] / compared.before[k]) for k in compared.after}
    limit = {Exactness.BITWISE: 0.0, Exactness.ALGEBRAIC: SAME_FUNCTION}.get(exactness, math.inf)
    as_good = all(ratio <= AS_GOOD for ratio in ratios.values())
    error_ratio = max(ratios.values(), default=1.0)
    decisive = compared.float64 if as_good or float64_error > limit else ratios
    worst_output = max(decisive, key=decisive.__getitem__, default="")
    passed = float64_error <= limit and as_good and not unproved and not wrong
    return Evidence(
        passed=passed,
        exactness=exactness.name,
        float64_error=float64_error,
        error_ratio=error_ratio,
        worst=compared.first_off or worst_output,
        dtype=str(_working_dtype(before)).removeprefix("torch."),
        outputs={name: promises.get(name, "values") for name in before.outputs},
        tensors_checked=len(changed),
        unproved=unproved,
        wrong_tensors=wrong,
        choices_flipped=compared.flips,
        bounds=dict(bounds or {}),
    )


class _AsWritten(Mapping[str, Tensor]):
    """The rewritten parameters as they would be written, made when asked for."""

    def __init__(self, graph: Graph) -> None:
        self.graph = graph

    def __getitem__(self, name: str) -> Tensor:
        return self.graph.evaluate(name, None)

    def __iter__(self):
        return iter(self.graph.changed())

    def __len__(self) -> int:
        return len(self.graph.changed())


def _compared(before: Graph, after: Graph, inputs: Sequence[Inputs], spare, stored, promises) -> Comparison:
    """All inputs, and as many spare ones as it takes until every output has values enough."""
    compared = Comparison()
    for i, example in enumerate(itertools.chain(inputs, spare)):
        if i >= len(inputs) and all(count >= ENOUGH for count in compared.values.values()):
            break
        _compare(before, after, example, stored, promises, compared)
    return compared


def _compare(before: Graph, after: Graph, example: Inputs, stored, promises, compared: Comparison) -> None:
    choices: dict[str, Tensor] = {}
    truth_at: dict[str, Tensor] = {}
    with torch.no_grad():
        truth = before.run(example, float64=True, watch=_remember(choices, truth_at))
        same = after.run(example, float64=True, watch=_first_off(truth_at, compared))
        pin = _pin(choices, compared)
        rough = before.run(example, watch=pin)
        new = after.run(example, stored, watch=pin)
    for name, true in truth.items():
        if promises.get(name) == "argmax":
            equal = torch.equal(true.argmax(-1), same[name].argmax(-1))
            _keep_max(compared.largest, name, 1.0)
            _keep_max(compared.off, name, 0.0 if equal else 1.0)
            continue
        off, largest = _difference(same[name], true)
        _keep_max(compared.off, name, off)
        _keep_max(compared.largest, name, largest)
        rounding = _squared_error(true.to(rough[name].dtype), true)
        compared.values[name] = compared.values.get(name, 0) + true.numel()
        _add(compared.before, name, max(_squared_error(rough[name], true), rounding, torch.finfo(torch.float64).tiny))
        _add(compared.after, name, _squared_error(new[name], true))
    if max(compared.float64.values(), default=0.0) <= SAME_FUNCTION:
        compared.first_off = ""


def _add(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = errors.get(name, 0.0) + error


def _keep_max(errors: dict[str, float], name: str, error: float) -> None:
    errors[name] = max(errors.get(name, 0.0), error)


def _largest(one: Tensor, true: Tensor) -> float:
    """Largest difference over largest value."""
    off, largest = _difference(one, true)
    return off / (largest or 1.0)


def _difference(one: Tensor, true: Tensor) -> tuple[float, float]:
    """Largest difference and largest value; infinities (masks) must agree exactly."""
    finite = torch.isfinite(true)
    if not torch.equal(finite, torch.isfinite(one)):
        return float("inf"), 1.0
    if not finite.any():
        return 0.0, 0.0
    return (one[finite] - true[finite]).abs().max().item(), true[finite].abs().max().item()


def _squared_error(one: Tensor, true: Tensor) -> float:
    """The squared Frobenius norm of the difference, where the truth is finite; to be summed over inputs."""
    finite = torch.isfinite(true)
    difference = one[finite].double() - true[finite]
    return difference.square().sum().item() if bool(torch.isfinite(difference).all()) else float("inf")


def same_bits(one: Tensor, two: Tensor) -> bool:
    return one.dtype == two.dtype and one.shape == two.shape and torch.equal(_bits(one), _bits(two))


def _bits(tensor: Tensor) -> Tensor:
    """A tensor's bits, so that equality is of bits: -0.0 is not 0.0."""
    kinds = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    return tensor.detach().contiguous().view(kinds[tensor.element_size()])


def _working_dtype(graph: Graph) -> torch.dtype:
    floats = (graph.dtype_of(n) for n in graph.values if graph.dtype_of(n).is_floating_point)
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
    args: Any = (*node.args, None, None)
    given: Any = node.kwargs.get("dim", args[2 if node.target is aten.topk.default else 1])
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

    A derivative says for all of them at once what perturbing one after the other would say; a tensor that only decides
    which of several values is chosen has none, and is perturbed.
    """
    still = {name: torch.ones(len(_slices(after, name)), dtype=torch.bool) for name in after.changed()}
    for example in inputs:
        for name, gradient in _gradients(after, example, [n for n, left in still.items() if bool(left.any())]):
            if gradient is not None:
                still[name] &= ~(gradient.reshape(len(still[name]), -1) != 0).any(1)
            if bool(still[name].all()) and _moves(after, example, name):
                still[name][:] = False
        if not any(bool(left.any()) for left in still.values()):
            return []
    return [_slices(after, name)[i] for name, left in still.items() for i in left.nonzero().flatten().tolist()]


def _slices(graph: Graph, name: str) -> list[str]:
    """What must move: the tensor, or each expert's part of it."""
    tensor = graph.tensors.get(name)
    grouped = any(n.target is expert_linear or "grouped_mm" in str(n.target) for n in uses(graph)[name])
    if tensor is not None and tensor.ndim == 3 and grouped:
        return [f"{name}[{expert}]" for expert in range(len(tensor))]
    return [name]


def _gradients(after: Graph, example: Inputs, names: list[str]) -> list[tuple[str, Tensor | None]]:
    """The derivative of the outputs by each tensor; by what is computed first from a tensor of integers."""
    leaves = [(n, after.evaluate(n).requires_grad_()) for n in names if after.dtype_of(n).is_floating_point]
    real = dict(leaves)
    first = {node: name for name in names if name not in real for node in _first_reals(after, name)}

    def watch(node: fx.Node, value: Any, value_of: Any) -> Any:
        if node not in first:
            return value
        leaves.append((first[node], torch.zeros_like(value, requires_grad=True)))
        return value + leaves[-1][1]

    with torch.enable_grad():
        results = after.run(example, real, float64=True, watch=watch)
        generator = torch.Generator().manual_seed(0)
        projections = [_projection(r, generator) for r in results.values() if r.requires_grad]
        if not projections:
            return [(name, None) for name in names]
        total, tensors = torch.stack(projections).sum(), [leaf for _, leaf in leaves]
        gradients = torch.autograd.grad(total, tensors, allow_unused=True)
    return [(name, gradient) for (name, _), gradient in zip(leaves, gradients, strict=True)]


def _first_reals(graph: Graph, name: str) -> list[fx.Node]:
    """The nodes at which a tensor of integers becomes real numbers."""
    found, todo = [], [graph.placeholders("parameter")[name]]
    while todo:
        for user in todo.pop().users:
            (found if _continuous(user.meta.get("val")) else todo).append(user)
    return found


def _moves(after: Graph, example: Inputs, name: str) -> bool:
    with torch.no_grad():
        one = after.run(example, float64=True)
        two = after.run(example, {name: _perturbed(after.evaluate(name))}, float64=True)
    return any(not torch.equal(one[k], two[k]) for k in one)


def _perturbed(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value ^ 1
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    return value + value.abs().mean() * noise


def _projection(result: Tensor, generator: torch.Generator) -> Tensor:
    finite = torch.where(torch.isfinite(result), result, 0.0)
    return (finite * torch.randn(result.shape, generator=generator, dtype=torch.float64).to(result.device)).sum()


def compare_modules(before: nn.Module, after: nn.Module, inputs: Inputs) -> Evidence:
    """The working-dtype outputs side by side. Without a record of what was done it is no proof, and never passes.

    Raises BadInput where `after` cannot run on what `before` does.
    """
    with torch.no_grad():
        one = dict(named_tensors(before(**inputs)))
        try:
            two = dict(named_tensors(after(**inputs)))
        except (IndexError, RuntimeError, TypeError, ValueError) as error:
            cause = f"AFTER does not run on BEFORE's inputs: {reason(error)}"
            raise BadInput(cause, "compare the right pair") from error
    errors = {k: _largest(two[k].double(), one[k].double()) for k in one if k in two and one[k].shape == two[k].shape}
    notes = [f"{name} differs by {error:.3e} of its largest value" for name, error in errors.items()]
    missing = sorted(set(one) ^ set(two))
    if missing:
        notes.append(f"outputs that only one of them has: {', '.join(missing)}")
    worst = max(errors, key=errors.__getitem__, default="")
    nan = float("nan")
    notes.insert(0, "there is no record of how AFTER was made, so the outputs are compared and nothing is proved")
    return Evidence(False, "unknown", errors.get(worst, nan), nan, worst, notes=notes)
