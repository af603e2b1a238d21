"""The command line: the verbs of the Python API, with tables for people and `--json` for scripts."""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from taut import __version__

app = typer.Typer(
    help="Take the slack out of a transformer, and prove that it is still the same model.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class FormName(StrEnum):
    stock = "stock"
    taut = "taut"


class OutputsName(StrEnum):
    all = "all"
    logits = "logits"


class DtypeName(StrEnum):
    float32 = "float32"
    bfloat16 = "bfloat16"
    float16 = "float16"


ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help="A directory or a hub id.")]
Json = Annotated[bool, typer.Option("--json", help="One JSON object on stdout, nothing else there.")]
Revision = Annotated[str | None, typer.Option(help="Branch, tag or commit of a hub model.")]
Remote = Annotated[bool, typer.Option("--trust-remote-code", help="Run the model code that the checkpoint brings.")]
Threads = Annotated[int | None, typer.Option(min=1, help="CPU threads to compute with.")]
Dtype = Annotated[DtypeName | None, typer.Option(help="Check the proof in this dtype, not in the checkpoint's own.")]
Outputs = Annotated[OutputsName, typer.Option(help="What keeps its values; logits gives up the hidden state.")]
Only = Annotated[list[str] | None, typer.Option(metavar="NAME", help="Only this rewrite; may be repeated.")]
Form = Annotated[FormName, typer.Option(help="stock loads in transformers without taut; taut may change structure.")]
MachineName = Annotated[str | None, typer.Option("--machine", metavar="NAME", help="Floors on it; see `machines`.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all of it to FILE.")]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Measure a lossy rewrite on it.")]
Untie = Annotated[bool, typer.Option("--untie", help="Give a tied head weights of its own.")]


@app.callback(invoke_without_command=True)
def _root(version: Annotated[bool, typer.Option("--version", help="Print the version.")] = False) -> None:
    if version:
        print(f"taut {__version__}")
        raise typer.Exit


@app.command()
def inspect(
    model: ModelArg,
    facts: Annotated[bool, typer.Option("--facts", help="What is known about every edge.")] = False,
    graph: Annotated[bool, typer.Option("--graph", help="Print the graph in the field's words.")] = False,
    everything: Annotated[bool, typer.Option("--all", help="List the sites of every rewrite.")] = False,
    ops: Annotated[bool, typer.Option("--ops", help="The floor of every op, not only of every kind.")] = False,
    norms: Annotated[bool, typer.Option("--norms", help="Which norms are free, can be made free, or never.")] = False,
    redundancy: Annotated[bool, typer.Option("--redundancy", help="Parameters that no input uses; runs it.")] = False,
    text: Annotated[Path | None, typer.Option(metavar="FILE", help="What --redundancy runs it on.")] = None,
    machine: MachineName = None,
    html: Html = None,
    outputs: Outputs = OutputsName.all,
    untie: Untie = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Show where each rewrite applies and where it is refused, with the reason; needs no weights."""
    with _command(as_json, threads):
        from taut import api, show, show_norms
        from taut.checkpoint import BadInput
        from taut.norm_report import norm_report
        from taut.redundancy import redundancy_of

        if text is not None and not redundancy:
            raise BadInput("--text is what --redundancy runs the model on", "add --redundancy, or leave --text out")
        found = api.inspect(
            model,
            outputs=outputs.value,
            revision=revision,
            trust_remote_code=trust_remote_code,
            untie=untie,
            dtype=dtype.value if dtype else None,
            machine=machine,
        )
        if html is not None:
            api.write_page(found, html)
        reports = norm_report(found.graph) if norms and found.graph is not None else None
        idle = redundancy_of(model, text, revision, trust_remote_code) if redundancy else None
        record = found.as_dict(ops)
        record |= {"norms": [report.as_dict() for report in reports]} if reports is not None else {}
        record |= {"redundancy": [layer.as_dict() for layer in idle]} if idle is not None else {}

        def tell() -> None:
            show.inspection(found, facts, graph, everything, ops)
            if reports is not None:
                show_norms.norms(reports)
            if idle is not None:
                show_norms.redundancy(idle)

        _print(as_json, record, tell)


@app.command()
def plan(
    model: ModelArg,
    form: Form = FormName.stock,
    only: Only = None,
    outputs: Outputs = OutputsName.all,
    untie: Untie = False,
    machine: MachineName = None,
    measure: Annotated[bool, typer.Option("--measure", help="Time each step here; leave out what is slower.")] = False,
    out: Annotated[Path | None, typer.Option(help="Write the plan here.")] = None,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    dtype: Dtype = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Say which rewrites would be applied where: the plan that `apply --plan` takes."""
    with _command(as_json, threads):
        from taut import api, show

        with _progress() as progress:
            made = api.plan(
                model,
                form=form.value,
                only=only,
                outputs=outputs.value,
                revision=revision,
                trust_remote_code=trust_remote_code,
                untie=untie,
                machine=machine,
                measure=measure,
                progress=progress,
            )
        if out is not None:
            made.save(out)
        _print(as_json, made.as_dict(), lambda: show.plan(made, out))


@app.command()
def apply(
    model: ModelArg,
    out: Annotated[Path, typer.Option(metavar="DIR", help="Where to write the rewritten checkpoint.")],
    only: Only = None,
    plan: Annotated[Path | None, typer.Option(metavar="FILE", help="A plan made by `taut plan`.")] = None,
    form: Form = FormName.stock,
    outputs: Outputs = OutputsName.all,
    untie: Untie = False,
    verify: Annotated[bool, typer.Option("--verify", help="Prove it on the full-size model too.")] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace DIR if it exists.")] = False,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    dtype: Dtype = None,
    text: Text = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Rewrite a checkpoint, prove that it is the same model, and write it to DIR."""
    with _command(as_json, threads):
        from taut import api, show
        from taut.plans import Plan

        chosen = Plan.load(plan) if plan else None
        with _progress() as progress:
            done = api.apply(
                model,
                chosen,
                None,
                only,
                form.value,
                out=out,
                outputs=outputs.value,
                untie=untie,
                verify=verify,
                force=force,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype.value if dtype else None,
                text=text,
                progress=progress,
            )
        _print(as_json, done.as_dict(), lambda: show.applied(done))


@app.command()
def verify(
    before: Annotated[str, typer.Argument(metavar="BEFORE", help="The original: a directory or a hub id.")],
    after: Annotated[str, typer.Argument(metavar="AFTER", help="The rewritten checkpoint.")],
    revision: Revision = None,
    trust_remote_code: Remote = False,
    dtype: Dtype = None,
    text: Text = None,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Prove that AFTER is still the model BEFORE; exit 1 if it is not, or if nothing can be proved."""
    with _command(as_json, threads):
        from taut import api, show

        with _progress() as progress:
            evidence = api.verify(
                before,
                after,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype.value if dtype else None,
                text=text,
                progress=progress,
            )
        _print(as_json, evidence.as_dict(), lambda: show.evidence(evidence))
        if not evidence.passed:
            raise typer.Exit(1)


@app.command()
def techniques(as_json: Json = False) -> None:
    """List every technique with its source."""
    with _command(as_json, None):
        from taut import show
        from taut.techniques import catalogue

        rows = catalogue()
        _print(as_json, {"techniques": [row.as_dict() for row in rows]}, lambda: show.techniques(rows))


class WeightsName(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


@app.command()
def bench(
    model: ModelArg,
    weights: Annotated[WeightsName | None, typer.Option(help="How weights are stored; by default as they are.")] = None,
    against: Annotated[
        str | None,
        typer.Option(metavar="MODEL", help="The original of a model in taut form, which is timed beside it."),
    ] = None,
    everything: Annotated[bool, typer.Option("--all", help="Time torch.compile too.")] = False,
    prompt: Annotated[int, typer.Option(min=1, help="Tokens of the prompt.")] = 64,
    tokens: Annotated[int, typer.Option(min=2, help="Tokens behind it.")] = 64,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds, in each of which all runners take their turn.")] = 7,
    out: Annotated[Path | None, typer.Option(metavar="FILE", help="Write the results as JSON to FILE.")] = None,
    html: Html = None,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Time transformers and taut in one run, after showing that they are the same model; exit 1 if they are not."""
    with _command(as_json, threads):
        from taut import benchmark, show_cost
        from taut.report import bench_page
        from taut.whole_file import write_text

        with _progress() as progress:
            found = benchmark.bench(
                model,
                weights=weights.value if weights else None,
                against=against,
                all=everything,
                prompt=prompt,
                tokens=tokens,
                rounds=rounds,
                revision=revision,
                trust_remote_code=trust_remote_code,
                progress=progress,
            )
        if out is not None:
            found.save(out)
        if html is not None:
            write_text(html, bench_page(found))
        _print(as_json, found.as_dict(), lambda: show_cost.bench(found))
        if not found.passed:
            raise typer.Exit(1)


@app.command()
def generate(
    model: ModelArg,
    prompt: Annotated[str, typer.Option(metavar="TEXT", help="What the text begins with.")],
    chat: Annotated[bool, typer.Option("--chat", help="Put the prompt into the model's chat template.")] = False,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="At most so many tokens.")] = 128,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the likeliest token.")] = 0.0,
    top_k: Annotated[int | None, typer.Option(min=1, help="Draw from the k likeliest.")] = None,
    top_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from the likeliest that sum to p.")
    ] = None,
    min_p: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Draw from those at least p the likeliest.")
    ] = None,
    seed: Annotated[int, typer.Option(min=0, help="The same seed draws the same tokens.")] = 0,
    device: Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")] = "cpu",
    weights: Annotated[WeightsName | None, typer.Option(help="How weights are kept; by default as stored.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Positions of prompt and text together.")] = None,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Stream the text behind a prompt, and say how near to the machine's limit it was."""
    from taut import show_text

    with _command(as_json, threads, quiet=False), _progress() as progress:

        def told(what: str) -> None:
            if what == "exporting the step":
                _quiet()
            progress(what, 0, 1)

        text = show_text.Text(
            model,
            prompt,
            chat,
            {"device": device, "weights": weights.value if weights else None, "max_length": max_length}
            | {"revision": revision, "trust_remote_code": trust_remote_code},
            {"max_new_tokens": max_new_tokens, "temperature": temperature, "seed": seed}
            | {"top_k": top_k, "top_p": top_p, "min_p": min_p},
        )
        text.open(told)
    with _command(as_json, threads, quiet=False):
        text.write(as_json)
        if text.interrupted:
            raise typer.Exit(130)


@app.command()
def machines(
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine, and remember it.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """List the machines whose data sheets taut knows, and this one if it has been measured."""
    with _command(as_json, threads):
        from dataclasses import asdict

        from taut import machine, show_cost
        from taut.ops import _dispatch

        with _progress() as progress:
            here = machine.measure(lambda what: progress(what, 0, 1)) if measure else machine.measured()
            if measure:
                _dispatch.measure(lambda what: progress(what, 0, 1))
        known = {name: machine.load(name) for name in machine.names()}
        record = {"this": asdict(here) if here else None, "machines": {name: asdict(m) for name, m in known.items()}}
        _print(as_json, record, lambda: show_cost.machines(known, here))


@app.command()
def demo(
    out: Annotated[Path | None, typer.Option(metavar="DIR", help="Keep the rewritten model here.")] = None,
    as_json: Json = False,
) -> None:
    """Run the main job on the model that comes with taut: inspect, apply, verify, compare."""
    with _command(as_json, None):
        from taut import show
        from taut.demonstrate import demonstrate

        shown = demonstrate(out, _nothing if as_json else show.told)
        _print(as_json, shown.as_dict(), lambda: show.demonstration(shown))
        if not shown.passed:
            raise typer.Exit(1)


@contextmanager
def _command(as_json: bool, threads: int | None, quiet: bool = True) -> Iterator[None]:
    """Set threads and logging, and turn what the user can mend into a cause, a cure and exit code 2.

    `quiet` keeps transformers quiet, for which it is imported.
    """
    logging.basicConfig(level=logging.WARNING, stream=sys.stderr, format="%(name)s: %(message)s")
    try:
        if threads is not None:
            import torch

            torch.set_num_threads(threads)
        if quiet:
            _quiet()
        yield
    except KeyboardInterrupt:
        print("interrupted; nothing was left behind", file=sys.stderr)
        raise typer.Exit(130) from None
    except Exception as error:
        code, cause, cure, evidence = _explain(error)
        if code is None:
            raise
        if as_json:
            print(json.dumps({"error": cause, "cure": cure} | ({"evidence": evidence} if evidence else {})))
        else:
            print(f"error: {cause}", file=sys.stderr)
            if cure:
                print(f"cure:  {cure}", file=sys.stderr)
        raise typer.Exit(code) from None


def _quiet() -> None:
    """Keep transformers' progress bars and remarks to itself; what it raises is told."""
    import transformers

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()


def _explain(error: Exception) -> tuple[int | None, str, str, dict[str, Any] | None]:
    from taut.checkpoint import BadInput, Mismatch
    from taut.plans import BadPlan
    from taut.proof import NotProved

    if isinstance(error, NotProved):
        return 1, str(error), "nothing was written; see the evidence, and report it", error.evidence.as_dict()
    if isinstance(error, BadInput):
        return 2, str(error), error.cure, None
    if isinstance(error, Mismatch):
        return 1, str(error), "nothing was left behind; check the disk, then try again", None
    if isinstance(error, BadPlan):
        return 2, str(error), "make a new plan with `taut plan`", None
    return None, "", "", None


def _print(as_json: bool, record: dict[str, Any], show: Callable[[], None]) -> None:
    if as_json:
        print(json.dumps(record, default=str))
    else:
        show()


@contextmanager
def _progress() -> Iterator[Callable[[str, int, int], None]]:
    """A bar on stderr for what takes long; silent where stderr is no terminal."""
    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"))
    console = Console(stderr=True)
    hidden = not console.is_terminal
    with Progress(*columns, TimeRemainingColumn(), console=console, transient=True, disable=hidden) as bar:
        task, now = bar.add_task("reading", total=None), ""

        def report(what: str, done: int, total: int) -> None:
            nonlocal now
            if what != now:
                bar.reset(task, description=what, total=None)
                now = what
            bar.update(task, completed=done, total=total if total > 1 else None)

        yield report


def _nothing(what: Any) -> None:
    """Say nothing: with `--json` only the object goes out."""


def main() -> None:
    app()
