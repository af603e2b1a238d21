"""How fast a model runs, and on what: bench, generate and machines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from taut.cli.command import answer, command, progress_bar, quiet_transformers
from taut.cli.options import Device, Html, Json, ModelArg, Remote, Revision, Threads, WeightsName


def bench(
    model: ModelArg,
    weights: Annotated[WeightsName | None, typer.Option(help="How weights are stored; by default as they are.")] = None,
    device: Device = "cpu",
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
    with command(as_json, threads):
        from taut import benchmark, show_cost
        from taut.report import bench_page
        from taut.whole_file import write_text

        with progress_bar() as progress:
            found = benchmark.bench(
                model,
                device=device,
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
        answer(as_json, found.as_dict(), lambda: show_cost.bench(found))
        if not found.passed:
            raise typer.Exit(1)


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
    device: Device = "cpu",
    weights: Annotated[WeightsName | None, typer.Option(help="How weights are kept; by default as stored.")] = None,
    max_length: Annotated[int | None, typer.Option(min=1, help="Positions of prompt and text together.")] = None,
    revision: Revision = None,
    trust_remote_code: Remote = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """Stream the text behind a prompt, and say how near to the machine's limit it was."""
    from taut import show_text

    with command(as_json, threads, quiet=False), progress_bar() as progress:

        def told(what: str) -> None:
            if what == "exporting the step":
                quiet_transformers()
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
    with command(as_json, threads, quiet=False):
        text.write(as_json)
        if text.interrupted:
            raise typer.Exit(130)


def machines(
    measure: Annotated[bool, typer.Option("--measure", help="Measure this machine, and remember it.")] = False,
    threads: Threads = None,
    as_json: Json = False,
) -> None:
    """List the machines whose data sheets taut knows, and this one and its GPU if they have been measured."""
    with command(as_json, threads):
        from dataclasses import asdict

        from taut import machine, show_cost
        from taut.ops import _dispatch

        with progress_bar() as progress:
            tell = lambda what: progress(what, 0, 1)  # noqa: E731
            here = {name: machine.measure(tell, name) if measure else machine.measured(name) for name in machine.here()}
            if measure:
                _dispatch.measure(tell)
        known = {name: machine.load(name) for name in machine.names()}
        record = {name: asdict(m) if m else None for name, m in {"this": here["cpu"], "gpu": here.get("cuda")}.items()}
        record["machines"] = {name: asdict(m) for name, m in known.items()}
        answer(as_json, record, lambda: show_cost.machines(known, here))
