"""What docs/normalization.md shows: all norms, which ones fold in which models, the recorded runs and their picture.

    python benchmarks/norms_table.py                # writes the tables into the page, and docs/norms.png

The first table is read from the modules of `taut/nn/norm` and measured on them: parameters, reductions and operations
in the reference code, what an input scaled or shifted does to the output, and which rewrites take something of it away.
The second is that of foldable_table.py. The others are computed from the records of units.py and norms.py.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from foldable_table import foldable_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from taut import techniques
from taut.catalogue import modules
from taut.lift import lift
from taut.nn import norm
from taut.rewrite import rewrites
from taut.tracing import CannotTrace, trace

HERE = Path(__file__).parent
RECORD = HERE / "results" / "h200" / "norms.json"
UNITS = HERE / "results" / "units.json"
PAGE = HERE.parent / "docs" / "normalization.md"
PICTURE = PAGE.with_name("norms.png")
REDUCTIONS = {
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "std": 1, "var": 1, "linalg_vector_norm": 1, "norm": 1,
    "native_layer_norm": 2, "var_mean": 2, "native_batch_norm": 2,
}  # fmt: skip
REFERENCE = "RMSNorm"


WHOLE = {"native_layer_norm": 6, "native_batch_norm": 6}
"""Operations a value of the norms that torch computes in one call: the statistics take four, normalising two, and one
each gain and bias."""
REMOVERS = ("fold_batch_norm", "fold_norm", "fold_qk_norm_gain", "center_norm_input", "defer_norm")


class Counted(TorchDispatchMode):
    """Counts what runs inside: reductions, and operations on values, of which a reduction has one for each it reads."""

    def __init__(self) -> None:
        super().__init__()
        self.reductions, self.operations = 0, 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, result = func._schema.name.removeprefix("aten::"), func(*args, **kwargs or {})
        self.reductions += REDUCTIONS.get(name, 0)
        if name in REDUCTIONS:
            affine = sum(isinstance(a, Tensor) for a in args[1:4]) if name in WHOLE else 0
            self.operations += (WHOLE.get(name, 1) + affine) * args[0].numel()
        elif torch.Tag.pointwise in func.tags:
            self.operations += tree_leaves(result)[0].numel()
        return result


class Between(nn.Module):
    """A norm between two layers, which nothing else reads; a pair of norms inside attention."""

    def __init__(self, layer: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        super().__init__()
        shape = arguments[0].shape
        self.pair, self.batch = len(arguments) == 2 and arguments[1].is_floating_point(), hasattr(layer, "running_var")
        d = shape[1] if self.batch else shape[-1]
        conv = (nn.Conv1d, nn.Conv2d)[len(shape) - 3] if self.batch else None
        make = (lambda a, b: conv(a, b, 1)) if conv else nn.Linear
        self.a, self.b, self.layer = make(d, d), make(d, d), layer
        self.x = torch.randn(2, d, *shape[2:]) if self.batch else torch.randn(2, 6, d)

    def forward(self, x: Tensor) -> Tensor:
        if not self.pair:
            return self.b(self.layer(self.a(x)))
        q, k = (part(x)[:, None] for part in (self.a, self.b))
        q, k = self.layer(q, k)
        return nn.functional.scaled_dot_product_attention(q, k, x[:, None])


def removed(layer: nn.Module, arguments: tuple[Tensor, ...]) -> str:
    """The rewrites that take something of a norm away between two layers, each after those before it."""
    model = Between(layer, arguments).float().eval()
    for parameter in layer.parameters():
        parameter.data = torch.rand_like(parameter) + 0.5
    try:
        graph = lift(trace(model, {"x": model.x}))
    except CannotTrace:
        return "none"
    names = []
    for name in REMOVERS:
        if any(site.refused is None for site in rewrites()[name].find(graph)):
            graph = rewrites()[name].apply(graph)
            names.append(f"`{name}`")
    return ", ".join(names) or "none"


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def examples() -> Iterator[tuple[ModuleType, type[nn.Module], nn.Module, tuple]]:
    """torch's LayerNorm and every norm of the folder, with the first of its own test cases."""
    yield import_module("taut.ops.layer_norm"), nn.LayerNorm, nn.LayerNorm(24).double(), (made(2, 3, 24),)
    for module in modules(norm.__name__):
        seen = set()
        for case, arguments in module.cases(made) if techniques.paragraph(module, "Source") else ():
            if type(case).__module__ == module.__name__ and type(case) not in seen:
                seen.add(type(case))
                yield module, type(case), case.double(), arguments


def unchanged(layer: nn.Module, arguments: tuple, factor: float, shift: float) -> str:
    """Whether the output is the same, within 1 %, for `factor x + shift` where x has unit variance."""
    moved = tuple(factor * a + shift if a.is_floating_point() else a for a in arguments)
    pairs = zip(*(v if isinstance(v, tuple) else (v,) for v in (layer(*arguments), layer(*moved))), strict=True)
    return "yes" if all((a - b).norm() < 0.01 * a.norm() for a, b in pairs) else "no"


def formula(kind: type) -> str:
    """The first clause of a class's docstring that is an equation, else its first sentence."""
    if kind is nn.LayerNorm:
        return "y = (x - mean) / sqrt(var + eps) * weight + bias"
    text = " ".join((inspect.getdoc(kind) or "").split())
    return re.split(r"(?<=[^.])[.;:] |, for | over the last axis", text)[0].rstrip(".,")


def norms_table() -> str:
    """A row for each norm in `taut/nn/norm`."""
    torch.manual_seed(0)
    lines = [
        "| norm | what it computes | parameters | reductions | operations | x → 4x | x → x + 1 | goes by | source |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for module, kind, layer, arguments in examples():
        with Counted() as counted:
            layer(*arguments)
        names = ", ".join(name for name, _ in layer.named_parameters()) or "none"
        values = sum(a.numel() for a in arguments if a.is_floating_point())
        same = (unchanged(layer, arguments, 4, 0), unchanged(layer, arguments, 1, 1))
        operations = "emulated" if hasattr(module, "study") else str(round(counted.operations / values))
        cells = (f"`{kind.__name__}`", formula(kind), names, str(counted.reductions), operations, *same,
                 removed(layer, arguments), techniques.paragraph(module, "Source"))  # fmt: skip
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    return "\n".join(lines)


def final(record: dict[str, Any], name: str) -> dict[int, float]:
    """Held-out loss at the last step, by seed."""
    return {run["seed"]: run["curve"][-1][2] for run in record["runs"] if run["norm"] == name}


def spread(values: list[float], digits: int = 3) -> str:
    """Mean ± standard deviation."""
    return f"{statistics.mean(values):.{digits}f} ± {statistics.stdev(values):.{digits}f}"


def training_table(record: dict[str, Any]) -> str:
    """A row for each variant: learning rate, final held-out loss, difference from RMSNorm seed by seed, and time."""
    lines = [
        f"| norm | learning rate | held-out loss | least to greatest | minus {REFERENCE}, same seed | ms a step |",
        "|---|---|---|---|---|---|",
    ]
    reference = final(record, REFERENCE)
    for name in record["parameters"]:
        losses = final(record, name)
        differences = [loss - reference[seed] for seed, loss in losses.items()]
        steps = [1000 * run["curve"][-1][1] / record["steps"] for run in record["runs"] if run["norm"] == name]
        cells = (name, f"{record['learning_rate'][name]:g}", spread(list(losses.values())),
                 f"{min(losses.values()):.3f} to {max(losses.values()):.3f}",
                 "0" if name == REFERENCE else spread(differences), spread(steps, 2))  # fmt: skip
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def trials_table(record: dict[str, Any]) -> str:
    """Held-out loss of the short runs that chose the learning rates."""
    rates = record["settings"]["learning_rates"]
    lines = ["| norm | " + " | ".join(f"{rate:g}" for rate in rates) + " |", "|---" * (len(rates) + 1) + "|"]
    for name, losses in record["trials"].items():
        shown = [f"{losses[str(rate)]:.2f}" if losses[str(rate)] is not None else "diverged" for rate in rates]
        lines.append(f"| {name} | {' | '.join(shown)} |")
    return "\n".join(lines)


def units_table(record: dict[str, Any]) -> str:
    """A row for each unit: perplexity with it, how far it moved, and how far the predictions did."""
    lines = [
        "| unit | in place of | perplexity | moved by | divergence, nats a token | same likeliest token |",
        "|---|---|---|---|---|---|",
    ]
    for row in record["rows"]:
        place = f"{row['sites']} {'softmaxes' if 'softmax' in row['unit'] else 'norms'} of `{row['model']}`"
        moved = f"{row['perplexity_after'] / row['perplexity_before'] - 1:+.2%}".replace("-0.00%", "+0.00%")
        shown = f"{row['perplexity_before']:.3f} → {row['perplexity_after']:.3f} | {moved} | {row['kl']:.1e}"
        lines.append(f"| {row['unit']} | {place} | {shown} | {row['agreement']:.1%} |")
    return "\n".join(lines)


def picture(record: dict[str, Any], path: Path) -> None:
    """Held-out loss against steps and against seconds: a line a variant, the mean over seeds, and their extent."""
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(12, 4.6), sharey=True, layout="constrained")
    for name in record["parameters"]:
        curves = torch.tensor([run["curve"] for run in record["runs"] if run["norm"] == name])
        for axis, column in zip(axes, (0, 1), strict=True):
            at, losses = curves[:, :, column].mean(0), curves[:, :, 2]
            (line,) = axis.plot(at, losses.mean(0), label=name)
            axis.fill_between(at, losses.amin(0), losses.amax(0), color=line.get_color(), alpha=0.15, linewidth=0)
    axes[0].set(xlabel="steps", ylabel="held-out loss (nats a token)", ylim=(2.2, 5.2))
    axes[1].set(xlabel="seconds of training")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", frameon=False)
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.savefig(path, dpi=110)
    plt.close(figure)


def filled(page: str, name: str, table: str) -> str:
    """The page with what stands between the two marks `name` replaced. Raises ValueError where they are missing."""
    pattern = re.compile(rf"(<!-- {name}: written by benchmarks/norms_table.py -->\n).*?(<!-- end -->)", re.S)
    if not pattern.search(page):
        raise ValueError(f"the page has no place marked {name!r}")
    return pattern.sub(lambda match: f"{match[1]}{table}\n{match[2]}", page)


def written(page: str, record: dict[str, Any]) -> str:
    """The page with all its tables as the code and the record have them."""
    tables = {"norms": norms_table(), "foldable": foldable_table()}
    tables |= {"runs": training_table(record), "trials": trials_table(record)}
    tables["units"] = units_table(json.loads(UNITS.read_text()))
    for name, table in tables.items():
        page = filled(page, name, table)
    return page


def main() -> None:
    record = json.loads(RECORD.read_text())
    PAGE.write_text(written(PAGE.read_text(), record))
    picture(record, PICTURE)


if __name__ == "__main__":
    main()
