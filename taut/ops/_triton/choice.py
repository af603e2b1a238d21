"""Which kernel and configuration serves a product: a table measured on this kind of device, shipped or made anew.

A table is JSON: {"device", "torch", "triton", "measured": [{"kind", "n", "k", "tokens", "config", "us", "vendor_us",
"product_us", "summed"}]}, with `config` null where the vendor's product is faster; `summed`, of one token, is the
configuration for an input that is summed on the way. A product takes the row of its kind and of the least token count
that is not below its own whose n and k are nearest. `python -m taut.ops._triton.tune` makes one.
"""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from pathlib import Path

import torch

from taut.ops._triton.launch import Config
from taut.user_cache import user_cache

BUCKETS = (1, 16, 64, 256, 1024)
"""Token counts that are measured; a product of fewer tokens takes the next one's row."""


def choose(
    kind: str, tokens: int, n: int, k: int, device: str, alone: bool = False, summed: bool = False
) -> Config | str:
    """The configuration for a `linear` or a `glu` on a device of a name, or why the vendor's product serves it.

    `alone` asks for a product without a norm before it: then ours must not be slower than the vendor's alone.
    `summed` asks for one that adds two inputs on the way.
    """
    if tokens > BUCKETS[-1]:
        return f"more than {BUCKETS[-1]} tokens are the vendor's"
    rows = table(device)
    if not rows:
        return f"no table of measured choices for {device}; make one with python -m taut.ops._triton.tune"
    bucket = min(b for b in BUCKETS if b >= tokens)
    near = [row for row in rows if (row["kind"], row["tokens"]) == (kind, bucket)]
    if not near:
        return f"the table of {device} has no {kind} of {bucket} tokens"
    row = min(near, key=lambda row: abs(math.log(row["n"] / n)) + abs(math.log(row["k"] / k)))
    if row["config"] is None or (alone and row["us"] > row["product_us"]):
        return f"the vendor's product is faster at {bucket} tokens near ({k}, {n})"
    return Config(*(row.get("summed", row["config"]) if summed else row["config"]))


@cache
def table(device: str) -> list[dict]:
    """The measured rows for a device: those made here, else those that taut ships, else none."""
    shipped = resources.files("taut") / "machines" / "kernels" / file_name(device)
    for place in (made_here(device), shipped):
        if place.is_file():
            return json.loads(place.read_text())["measured"]
    return []


def made_here(device: str) -> Path:
    """Where this machine's own table lies."""
    return user_cache("kernels") / file_name(device)


def file_name(device: str) -> str:
    return device.lower().replace(" ", "-") + ".json"


@cache
def device_name(index: int) -> str:
    return torch.cuda.get_device_name(index)
