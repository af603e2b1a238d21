"""The options that several commands share."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


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


class WeightsName(StrEnum):
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"
    int8 = "int8"
    int4 = "int4"


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
Device = Annotated[str, typer.Option(help="Where to compute: cpu, or cuda.")]
Html = Annotated[Path | None, typer.Option("--html", metavar="FILE", help="Write a page with all of it to FILE.")]
Text = Annotated[Path | None, typer.Option("--text", metavar="FILE", help="Measure a lossy rewrite on it.")]
Untie = Annotated[bool, typer.Option("--untie", help="Give a tied head weights of its own.")]
