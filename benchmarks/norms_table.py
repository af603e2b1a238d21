"""What docs/normalization.md shows: all norms, which ones fold in which models, the recorded runs and their picture.

    python benchmarks/norms_table.py                # writes the tables into the page, and docs/norms.png

The first table is read from the modules of `taut/nn/norm` and measured on them: parameters, reductions in the reference
code, what an input scaled or shifted does to the output. The second is that of
foldable_table.py. The others are computed from the record of norms.py.
"""

from __future__ import annotations

import inspect
import json
import re
import statistics
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from foldable_table import foldable_table
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from taut import techniques
from taut.catalogue import modules
from taut.nn import norm

HERE = Path(__file__).parent
RECORD = HERE / "results" / "h200" / "norms.json"
PAGE = HERE.parent / "docs" / "normalization.md"
PICTURE = PAGE.with_name("norms.png")
REDUCTIONS = {
    "mean": 1, "sum": 1, "amax": 1, "amin": 1, "std": 1, "var": 1, "linalg_vector_norm": 1, "norm": 1,
    "native_layer_norm": 2, "var_mean": 2, "native_batch_norm": 2,
}  # fmt: skip
REFERENCE = "RMSNorm"


class Reductions(TorchDispatchMode):
    """Counts the reductions that run inside."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += REDUCTIONS.get(func._schema.name.removeprefix("aten::"), 0)
        return func(*args, **kwargs or {})


def made(*shape: int) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64)


def examples() -> Iterator[tuple[ModuleType, type[nn.Module], nn.Module, tuple]]:
    """Every norm of the folder, with the first of its own test cases."""
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
    text = " ".join((inspect.getdoc(kind) or "").split())
    return re.split(r"(?<=[^.])[.;:] |, for | over the last axis", text)[0].rstrip(".,")


def norms_table() -> str:
    """A row for each norm in `taut/nn/norm`."""
    torch.manual_seed(0)
    lines = [
        "| norm | what it computes | parameters | reductions | x → 4x | x → x + 1 | source |",
        "|---|---|---|---|---|---|---|",
    ]
    for module, kind, layer, arguments in examples():
        with Reductions() as reductions:
            layer(*arguments)
        names = ", ".join(name for name, _ in layer.named_parameters()) or "none"
        same = (unchanged(layer, arguments, 4, 0), unchanged(layer, arguments, 1, 1))
        cells = (f"`{kind.__name__}`", formula(kind), names, str(reductions.count), *same,
                 techniques.paragraph(module, "Source"))  # fmt: skip
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
    for name, table in tables.items():
        page = filled(page, name, table)
    return page


def main() -> None:
    record = json.loads(RECORD.read_text())
    PAGE.write_text(written(PAGE.read_text(), record))
    picture(record, PICTURE)


if __name__ == "__main__":
    main()
