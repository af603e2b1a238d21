"""A program on a device: which devices decode, what fits into their memory, and the program's tensors put there."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import fields, is_dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from taut.checkpoint.errors import BadInput
from taut.huge_pages import side_by_side
from taut.op import nbytes
from taut.ops._laid import Laid, copied, laid
from taut.runtime.steps import Embed, Glu, Linear, Program, Weight

ON_CPU = 'take device="cpu"'
LARGE = 2**25
"""Bytes that no cache of a processor holds."""
LEAST = (8, 0)
"""The least compute capability: bfloat16 on the tensor cores."""


def gpu(name: str) -> torch.device:
    """The CUDA device of a name. Raises BadInput where taut cannot decode on it."""
    try:
        device = torch.device(name)
    except RuntimeError:
        raise BadInput(f"no device {name!r}", 'take "cpu" or "cuda"') from None
    if device.type != "cuda":
        raise BadInput(f"no engine for device {name!r}", 'take "cpu" or "cuda"')
    if not torch.cuda.is_available():
        raise BadInput("torch finds no GPU on this machine", ON_CPU)
    index, count = device.index or 0, torch.cuda.device_count()
    if index >= count:
        raise BadInput(f"no GPU {index}: this machine has {count}", f"name another, or {ON_CPU}")
    if find_spec("triton") is None:
        raise BadInput("Triton, in which the kernels are written, is not installed", f"install it, or {ON_CPU}")
    found = torch.cuda.get_device_capability(index)
    if found < LEAST:
        raise BadInput(f"a GPU of compute capability {found[0]}.{found[1]}; the kernels need 8.0", ON_CPU)
    return torch.device("cuda", index)


def check_room(program: Program, caches: int, device: torch.device) -> None:
    """Raises BadInput where the weights that are not on the device yet and the caches (bytes) exceed what is free."""
    weights = sum(nbytes(t) for t in _tensors(program) if t.device.type != device.type)
    free = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    if weights + caches > free:
        sizes = f"{weights / 2**30:.1f} GiB of weights and {caches / 2**30:.1f} GiB of caches"
        cause = f"the GPU has {free / 2**30:.1f} GiB free, and the model needs {sizes}"
        raise BadInput(cause, f"take a smaller max_length or max_batch, or {ON_CPU}")


def check_formats(program: Program) -> None:
    """Raises BadInput for weights in a format that no kernel of a GPU reads."""
    for weight in matrices(program):
        if weight.scale is not None or not weight.data.is_floating_point():
            cause = "weights that are stored in int8 or int4 run on a CPU alone so far"
            raise BadInput(cause, f'take weights="bf16", or {ON_CPU}')


def matrices(program: Program, looked_up: bool = True) -> Iterator[Weight]:
    """Every matrix that a step multiplies by and, with `looked_up`, those that it takes rows of."""
    for step in program.steps:
        match step:
            case Linear():
                yield step.weight
            case Glu():
                yield from (step.gate, step.up)
            case Embed() if looked_up:
                yield from (weight for weight in (step.table, step.positions) if weight is not None)


def stored(program: Program) -> list[Tensor]:
    """What the matrices that a program multiplies by are stored as, in the order of reading."""
    return [part for weight in matrices(program, False) for part in (weight.data, weight.scale) if part is not None]


def dtype_of(program: Program) -> torch.dtype:
    """The dtype of all matrices that are multiplied; float32 where they differ or are codes."""
    found = {weight.data.dtype if weight.scale is None else torch.float32 for weight in matrices(program, False)}
    return found.pop() if len(found) == 1 else torch.float32


def placed(program: Program, device: torch.device) -> Program:
    """The program with its tensors on a device, each put there once."""
    return _moved(program, device, {})


def gathered(program: Program, tokens: int, caches: int) -> Program:
    """The program with copies of what it multiplies by, one behind the other on large pages in the order of reading.

    They lie as so many tokens at a time are multiplied fastest. The program itself where the copies would take more
    than half of the memory that is free beside the caches (bytes).
    """
    free, size = free_memory(), sum(map(nbytes, {_place(t): t for t in stored(program)}.values()))
    if free is None or 2 * size + caches > free:
        return program
    plans: dict[tuple, Laid] = {}
    for weight in matrices(program, False):
        plans[_place(weight.data)] = laid(weight.data, tokens, cached=size < LARGE)
        if weight.scale is not None:
            plans[_place(weight.scale)] = copied(weight.scale)
    rooms = side_by_side([plan.nbytes for plan in plans.values()])
    copies = {at: plan.write(room) for (at, plan), room in zip(plans.items(), rooms, strict=True)}

    def moved(weight: Weight) -> Weight:
        scale = weight.scale
        return Weight(copies[_place(weight.data)], None if scale is None else copies[_place(scale)])

    steps = list(program.steps)
    for i, step in enumerate(steps):
        match step:
            case Linear():
                steps[i] = replace(step, weight=moved(step.weight))
            case Glu():
                steps[i] = replace(step, gate=moved(step.gate), up=moved(step.up))
    return replace(program, steps=tuple(steps))


def free_memory() -> int | None:
    """Bytes that can be had without swapping; None where the system does not tell."""
    info = Path("/proc/meminfo")
    lines = info.read_text().splitlines() if info.exists() else []
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable")), None)


def _place(t: Tensor) -> tuple:
    return t.data_ptr(), t.dtype, t.shape, t.stride()


def _moved(value: Any, device: torch.device, known: dict[int, Any]) -> Any:
    if isinstance(value, Tensor):
        if id(value) not in known:
            known[id(value)] = value.detach().to(device).contiguous()
        return known[id(value)]
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{f.name: _moved(getattr(value, f.name), device, known) for f in fields(value)})
    if isinstance(value, tuple):
        return tuple(_moved(part, device, known) for part in value)
    if isinstance(value, Mapping):
        return {key: _moved(part, device, known) for key, part in value.items()}
    return value


def _tensors(value: Any) -> list[Tensor]:
    """Every tensor of a program, once."""
    found: dict[int, Tensor] = {}
    edge = [value]
    while edge:
        now = edge.pop()
        if isinstance(now, Tensor):
            found[id(now)] = now
        elif is_dataclass(now) and not isinstance(now, type):
            edge += [getattr(now, f.name) for f in fields(now)]
        elif isinstance(now, tuple):
            edge += now
        elif isinstance(now, Mapping):
            edge += now.values()
    return list(found.values())
