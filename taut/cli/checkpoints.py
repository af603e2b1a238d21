"""What is done to a checkpoint: inspect, plan, apply and verify."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taut.cli.command import answer, command, progress_bar
from taut.cli.options import (
    Dtype,
    Form,
    FormName,
    Html,
    Json,
    MachineName,
    ModelArg,
    Only,
    Outputs,
    OutputsName,
    Remote,
    Revision,
    Text,
    Threads,
    Untie,
)


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
    with command(as_json, threads):
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
        reports = norm_report(found.graph) if norms else None
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

        answer(as_json, record, tell)


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
    with command(as_json, threads):
        from taut import api, show

        with progress_bar() as progress:
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
        answer(as_json, made.as_dict(), lambda: show.plan(made, out))


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
    with command(as_json, threads):
        from taut import api, show
        from taut.plans import Plan

        chosen = Plan.load(plan) if plan else None
        with progress_bar() as progress:
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
        answer(as_json, done.as_dict(), lambda: show.applied(done))


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
    with command(as_json, threads):
        from taut import api, show

        with progress_bar() as progress:
            evidence = api.verify(
                before,
                after,
                revision=revision,
                trust_remote_code=trust_remote_code,
                dtype=dtype.value if dtype else None,
                text=text,
                progress=progress,
            )
        answer(as_json, evidence.as_dict(), lambda: show.evidence(evidence))
        if not evidence.passed:
            raise typer.Exit(1)
