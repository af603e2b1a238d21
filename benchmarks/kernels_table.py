"""The tables and the picture of docs/kernels.md, from benchmarks/results/h200.

python benchmarks/kernels_table.py
"""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "h200"
PAGE = HERE.parent / "docs" / "kernels.md"
PICTURE = PAGE.with_suffix(".png")


def record(name: str) -> dict[str, Any]:
    return json.loads((RESULTS / f"{name}.json").read_text())


def table(head: list[str], rows: list[list[Any]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join("| " + " | ".join(str(cell) for cell in line) + " |\n" for line in lines)


def count(tokens: int) -> str:
    return f"{tokens} token{'s' * (tokens > 1)}"


def mean(numbers: list[float]) -> float:
    """Geometric."""
    return math.exp(sum(map(math.log, numbers)) / len(numbers))


def best_peer(us: dict[str, float]) -> float:
    """The least time but taut's and the bare product's."""
    return min(time for name, time in us.items() if name not in ("taut", "product"))


def projections() -> str:
    """Norm then project: the best peer's time over taut's."""
    found = {(r["kind"], r["k"], r["n"], r["tokens"]): r["us"] for r in record("norm_project")["rows"]}
    shapes = list(dict.fromkeys(key[:3] for key in found))
    counts = sorted({key[3] for key in found})
    rows = []
    for kind, k, n in shapes:
        times = [found[kind, k, n, tokens] for tokens in counts]
        cells = [f"{us['taut']:.1f} ({best_peer(us) / us['taut']:.2f}x)" for us in times]
        rows.append([f"({k}, {n}){' SwiGLU' if kind == 'glu' else ''}", *cells])
    return table(["(inputs, outputs)", *(f"{count(tokens)}" for tokens in counts)], rows)


def chains() -> str:
    rows = record("chains")["rows"]
    counts = sorted({r["tokens"] for r in rows})
    lines = []
    for chain, model in dict.fromkeys((r["chain"], r["model"]) for r in rows):
        own = {r["tokens"]: r for r in rows if (r["chain"], r["model"]) == (chain, model)}
        lines.append([chain, model, *(chain_cell(own[tokens]) for tokens in counts)])
    return table(["chain", "model", *(f"{count(t)}" for t in counts)], lines)


def chain_cell(row: dict[str, Any]) -> str:
    return f"{row['us']['taut']:.1f} ({row['gain']:.2f}x, {row['over_without_norm']:.2f})"


def attention() -> str:
    names = ["taut", "cudnn", "flash"]
    rows = record("decode_attention")["rows"]
    lines = [[r["case"], *(r["us"].get(name, "") for name in names), r["slack"]] for r in rows]
    return table(["keys", *names, "slack"], lines)


def draws() -> str:
    rows = record("sampling")["rows"]
    names = ("taut", "compiled", "product")
    lines = [[r["batch"], *(r["us"][n] for n in names), f"{r['us']['compiled'] / r['us']['taut']:.2f}x"] for r in rows]
    return table(["rows", "taut", "compiled multinomial", "product alone", "gain"], lines)


def decoding() -> str:
    """A token in milliseconds; rows of one case with different peers are one."""
    if not (RESULTS / "decode.json").exists():
        return "Not measured yet: `python benchmarks/decode.py` on an H200.\n"
    rows = record("decode")["rows"]
    peers = ("transformers, eager kernels", "transformers, torch.compile")
    lines = []
    for case in dict.fromkeys((r["model"], r["batch"], r["context"]) for r in rows):
        own = [r for r in rows if (r["model"], r["batch"], r["context"]) == case]
        ms = {way: time for row in reversed(own) for way, time in row["ms"].items()}
        shown = (f"{ms[peer]:.2f}" if peer in ms else "" for peer in peers)
        lines.append([*case, f"{ms['taut']:.3f}", *shown, f"{own[0]['floor_ms']:.3f}", f"{own[0]['slack']:.2f}"])
    return table(["model", "rows", "context", "taut", *peers, "floor", "slack"], lines)


TABLES = {
    "projections": projections,
    "chains": chains,
    "attention": attention,
    "draws": draws,
    "decoding": decoding,
}


def written(page: str) -> str:
    """The page with every table as the records have it. Raises ValueError where one has no place."""
    for name, made in TABLES.items():
        pattern = re.compile(rf"(<!-- {name}: written by benchmarks/kernels_table.py -->\n).*?(<!-- end -->)", re.S)
        if not pattern.search(page):
            raise ValueError(f"{PAGE} has no place for {name}")
        page = pattern.sub(lambda m, made=made: f"{m[1]}\n{made()}\n{m[2]}", page)
    return page


def picture() -> None:
    """The chains: how much faster than the best peer with the norm, by token count."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    rows = record("chains")["rows"]
    figure, axes = pyplot.subplots(1, 3, figsize=(10, 3.2), sharey=True)
    for axis, chain in zip(axes, dict.fromkeys(r["chain"] for r in rows), strict=True):
        for model in dict.fromkeys(r["model"] for r in rows):
            own = [r for r in rows if (r["chain"], r["model"]) == (chain, model)]
            axis.plot([r["tokens"] for r in own], [r["gain"] for r in own], marker="o", label=model)
        axis.axhline(1, color="grey", linewidth=0.8)
        axis.set(title=chain, xscale="log", yscale="log", xlabel="tokens")
        axis.set_xticks([1, 16, 64, 256, 1024, 4096], ["1", "16", "64", "256", "1024", "4096"])
        axis.set_yticks([1, 1.5, 2, 3], ["1", "1.5", "2", "3"])
        axis.minorticks_off()
    axes[0].set_ylabel("best peer's time / taut's")
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(PICTURE, dpi=110, metadata={"Software": None})


if __name__ == "__main__":
    PAGE.write_text(written(PAGE.read_text()))
    picture()
