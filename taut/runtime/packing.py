"""A program as the interpreter reads it: records of numbers and addresses, split where torch must run a step."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Set
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taut.ops._numba.abreast import whole
from taut.ops._numba.compressed import NAMES, size_of_block
from taut.ops._numba.formats import (
    BFLOAT16,
    BFLOAT16_ABREAST,
    BFLOAT16_COMPRESSED,
    FLOAT16,
    FLOAT16_ABREAST,
    FLOAT32,
    FLOAT32_ABREAST,
    FLOAT32_COMPRESSED,
    INT4_FLOAT,
    INT4_HALF,
    INT8,
    INT8_ABREAST,
    PRODUCTS,
)
from taut.ops._numba.products import ACTS
from taut.runtime._numba import dense, place, table
from taut.runtime._numba.dense import BLOCK, room_for
from taut.runtime._numba.place import MOST_CHUNKS, most_keys_a_chunk
from taut.runtime.steps import (
    Attend,
    Combine,
    Embed,
    Glu,
    Linear,
    Norm,
    Normalize,
    Program,
    Step,
    Torch,
    View,
    Weight,
)

FORMATS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16, torch.float16: FLOAT16}
FORMATS_ABREAST = {torch.float32: FLOAT32_ABREAST, torch.int32: BFLOAT16_ABREAST}
FORMATS_ABREAST |= {torch.float16: FLOAT16_ABREAST, torch.int8: INT8_ABREAST}
FORMATS_COMPRESSED = {torch.uint16: BFLOAT16_COMPRESSED, torch.uint32: FLOAT32_COMPRESSED}
LANES = 16
Fields = dict[str, Any]


@dataclass
class Record:
    """A step of the interpreter; `reads` and `writes` name memory, so that a wait is put in where one is needed.

    It is needed from `waits_from` rows on.
    """

    fields: Fields
    reads: Set[Hashable]
    writes: Set[Hashable]
    waits_from: int = 1


@dataclass
class Segment:
    """The half-open range of records that run in one parallel region."""

    first: int
    last: int


@dataclass
class Packed:
    """The tables of a program, and everything whose address they hold."""

    steps: np.ndarray
    attends: np.ndarray
    segments: list[Segment | Torch]
    buffers: dict[str, Tensor]
    arena: Tensor
    scratch: int
    kept: list[Tensor] = field(repr=False)


def places(program: Program) -> tuple[dict[str, int], int]:
    """(where each buffer begins, the width of all), in floats a row; buffers that never live together share a place."""
    last = {view.buffer: i for i, step in enumerate(program.steps) for view in reads_of(step)}
    last[program.logits] = len(program.steps)
    free, found, end = dict[int, list[int]](), dict[str, int](), 0
    for i, step in enumerate(program.steps):
        for name in writes_of(step):
            if name in found:
                continue
            width = padded(program.widths[name])
            if free.get(width):
                found[name] = free[width].pop()
            else:
                found[name], end = end, end + width
        for name in {view.buffer for view in reads_of(step)} | set(writes_of(step)):
            if last.get(name, i) == i:
                free.setdefault(padded(program.widths[name]), []).append(found[name])
    return found, end


def padded(width: int) -> int:
    return (width + LANES - 1) // LANES * LANES


def reads_of(step: Step) -> list[View]:
    """The views that a step reads."""
    match step:
        case Embed():
            views = []
        case Attend():
            views = [step.q, step.k, step.v]
        case Combine():
            views = [step.a, step.b]
        case Torch():
            views = list(step.inputs)
        case Glu():
            views = [step.x]
        case _:
            views = [step.x, step.residual]
    return [view for view in views if view is not None]


def writes_of(step: Step) -> tuple[str, ...]:
    return step.outs if isinstance(step, Torch) else (step.out,)


class Packer:
    """Turns the steps of a program into records for at most `max_batch` rows, over given caches."""

    def __init__(self, program: Program, max_batch: int, caches: list[tuple[Tensor, Tensor]]):
        self.program, self.max_batch, self.caches = program, max_batch, caches
        self.places, width = places(program)
        self.arena = torch.empty(max_batch * width)
        self.kept: list[Tensor] = [self.arena]
        self.converted: dict[tuple[int, torch.dtype], tuple[Tensor, Tensor]] = {}
        self.attends: list[Fields] = []
        self.scratch = 0
        self.shared = self._shared_by_attention()

    def pack(self, stepwise: bool) -> Packed:
        """The whole program; `stepwise` gives every record a segment of its own."""
        segments, records = list[Segment | Torch](), list[Record]()
        for step in self.program.steps:
            check_aliases(step)
            if isinstance(step, Torch):
                segments.append(step)
            for record in self.records(step):
                if stepwise or not segments or isinstance(segments[-1], Torch):
                    segments.append(Segment(len(records), len(records)))
                records.append(record)
                segments[-1] = Segment(segments[-1].first, len(records))  # type: ignore[union-attr]
        for segment in segments:
            if isinstance(segment, Segment):
                put_waits(records[segment.first : segment.last])
        put_next(records)
        buffers = {name: self.buffer(name) for name in self.places}
        steps = table_of(table.STEP, [record.fields for record in records])
        attends = table_of(table.ATTENTION, self.attends or [{}])
        return Packed(steps, attends, segments, buffers, self.arena, self.scratch, self.kept)

    def records(self, step: Step) -> Iterable[Record]:
        match step:
            case Embed():
                yield self._embed(step)
            case Normalize():
                yield self._normalize(step)
            case Linear():
                yield self._linear(step)
            case Glu():
                yield self._glu(step)
            case Combine():
                yield self._combine(step)
            case Attend():
                yield from self._attend(step)

    def _embed(self, step: Embed) -> Record:
        fields = {"run": place.embed(), "n": self.program.widths[step.out], "scale": step.scale} | self.output(step)
        if step.table is not None:
            fields |= self.weight(step.table, fields["n"])
        if step.positions is not None:
            fields |= self.weight(step.positions, fields["n"], "2") | {"offset": step.offset}
        return self.record(step, fields)

    def _normalize(self, step: Normalize) -> Record:
        fields = {"run": dense.normalize()} | self.input(step.x) | self.norm(step.norm) | self.output(step)
        return self.record(step, fields | self.view("residual", step.residual))

    def _linear(self, step: Linear) -> Record:
        k = width(step.x)
        fields = {"run": dense.linear(), "n": self.program.widths[step.out], "bias": self.vector(step.bias)}
        fields |= self.multiplied(step.weight, k) | self.input(step.x) | self.norm(step.norm) | self.output(step)
        fields |= {"act": ACTS.index(step.activation or "identity"), "scale": step.scale, "cap": step.softcap or 0.0}
        self._room((room_for(k) + BLOCK) * self.max_batch)
        return self.record(step, fields | self.view("residual", step.residual))

    def _glu(self, step: Glu) -> Record:
        k = width(step.x)
        fields = {"run": dense.glu(), "n": self.program.widths[step.out], "act": ACTS.index(step.activation)}
        fields |= self.multiplied(step.gate, k) | self.multiplied(step.up, k, "2")
        fields |= self.input(step.x) | self.norm(step.norm)
        fields |= {"bias": self.vector(step.gate_bias), "bias2": self.vector(step.up_bias)}
        self._room((room_for(k) + 2 * BLOCK) * self.max_batch)
        return self.record(step, fields | self.output(step))

    def _combine(self, step: Combine) -> Record:
        fields = {"run": dense.combine(), "n": width(step.a), "scale": step.scale, "b_scale": step.b_scale}
        fields |= self.input(step.a) | self.view("b", step.b) | self.output(step) | {"product": int(step.product)}
        return self.record(step, fields)

    def _attend(self, step: Attend) -> Iterable[Record]:
        self.attends.append(self._attention(step))
        index, cache = {"attend": len(self.attends) - 1}, ("cache", step.layer)
        group, longest = step.heads // step.kv_heads, self.program.max_length
        keys = most_keys_a_chunk(longest)
        self._room((step.heads + 1) * step.d + group * (keys + 2 + step.dv + step.d))
        reads = {self.places[view.buffer] for view in (step.q, step.k, step.v) if view is not None}
        # One row goes on to attend without a wait, so what attending touches is waited for before it is turned.
        writes = {"turned", "sums", cache} if step.k is not None else {"turned", "sums"}
        yield Record({"run": place.turn(), "early": place.attend_early()} | index, reads | {cache}, writes)
        # Of one row a thread attends by what it turned itself.
        yield Record({"run": place.attend()} | index, {"turned", cache}, {"sums"}, waits_from=2)
        yield Record({"run": place.merge_chunks()} | index | self.output(step), {"sums"}, {self.places[step.out]})

    def _attention(self, step: Attend) -> Fields:
        keys, values = self.caches[step.layer]
        form = FORMATS[keys.dtype]
        fields = {name: getattr(step, name) for name in ("heads", "kv_heads", "d", "dv", "scale")}
        fields |= self.shared | {"cap": step.softcap or 0.0, "cache_tag": form}
        fields |= {"append": place.APPEND[form](), "chunk": place.ATTEND_CHUNK[form]()}
        fields |= {"keys": keys.data_ptr(), "values": values.data_ptr()}
        for name, cache in (("keys", keys), ("values", values)):
            fields |= {f"{name}_{axis}": cache.stride(i) * cache.itemsize for i, axis in enumerate(("slot", "head"))}
        for name, view in (("q", step.q), ("k", step.k), ("v", step.v)):
            fields |= self.view(name, view)
        for name, norm in (("q_", step.q_norm), ("k_", step.k_norm)):
            found = self.norm(norm)
            fields |= {name + key.removeprefix("norm_"): value for key, value in found.items()}
        if step.rotary is not None:
            fields |= {"cos": self.positional(step.rotary.cos), "sin": self.positional(step.rotary.sin)}
            fields |= {"half": step.rotary.cos.shape[1], "interleaved": int(step.rotary.interleaved)}
        first = None if step.first is None else self.positional(step.first, torch.int64)
        return fields | {"first": first or 0, "alibi": self.vector(step.alibi), "sinks": self.vector(step.sinks)}

    def _shared_by_attention(self) -> Fields:
        """Memory that attention steps use one after the other: turned queries, and what the chunks found."""
        steps = [step for step in self.program.steps if isinstance(step, Attend)]
        chunks = MOST_CHUNKS
        queries = max((step.heads * step.d for step in steps), default=0)
        heads = max((step.heads for step in steps), default=0)
        sums = max((step.heads * step.dv for step in steps), default=0)
        room = {name: self.keep(torch.empty(self.max_batch * size)).data_ptr() for name, size in (
            ("turned", queries), ("peaks", heads * chunks), ("totals", heads * chunks), ("sums", sums * chunks)
        )}  # fmt: skip
        return room | {"turned_stride": 4 * queries, "chunks": chunks}

    def record(self, step: Embed | Normalize | Linear | Glu | Combine, fields: Fields) -> Record:
        return Record(fields, {self.places[view.buffer] for view in reads_of(step)}, {self.places[step.out]})

    def buffer(self, name: str) -> Tensor:
        """The memory of a buffer (max_batch, width)."""
        step = padded(self.program.widths[name])
        place = self.arena[self.places[name] * self.max_batch :][: step * self.max_batch]
        return place.view(self.max_batch, step)[:, : self.program.widths[name]]

    def view(self, name: str, view: View | None) -> Fields:
        if view is None:
            return {}
        rows = self.buffer(view.buffer)[:, view.start : view.stop]
        return {name: rows.data_ptr(), f"{name}_stride": 4 * rows.stride(0)}

    def input(self, view: View) -> Fields:
        return self.view("x", view) | {"k": width(view)}

    def output(self, step: Step) -> Fields:
        name = writes_of(step)[0]
        return self.view("out", View(name, 0, self.program.widths[name]))

    def norm(self, norm: Norm | None) -> Fields:
        if norm is None:
            return {"norm": table.PLAIN}
        kind = table.CENTRED if norm.centred else table.RMS
        return {"norm": kind, "eps": norm.eps, "gain": self.vector(norm.gain), "norm_bias": self.vector(norm.bias)}

    def weight(self, weight: Weight, k: int, suffix: str = "") -> Fields:
        """Format and addresses of a weight of k inputs. Raises ValueError for a format the interpreter lacks."""
        data, scale = self.keep(weight.data), weight.scale
        if scale is not None and data.dtype == torch.int8:
            scale = self.keep(scale.flatten(), torch.float32)
        if data.ndim == 3:
            form = FORMATS_ABREAST.get(data.dtype)
            fits = data.shape[1] * (2 if form == BFLOAT16_ABREAST else 1) == whole(k)
        elif scale is None and data.dtype in FORMATS_COMPRESSED:
            form, fits = FORMATS_COMPRESSED[data.dtype], takes(data, k)
        elif scale is None:
            form, fits = FORMATS.get(data.dtype), data.shape[-1] == k
        elif data.dtype == torch.int8:
            form, fits = INT8, data.shape[-1] == k
        else:
            form, fits = INT4_HALF if scale.dtype == torch.float16 else INT4_FLOAT, data.shape[-1] * 2 == k
            scale = self.keep(scale, None if form == INT4_HALF else torch.float32)
        if form is None or not fits:
            raise ValueError(f"a {data.dtype} weight {tuple(data.shape)} is in no format that reads {k} inputs")
        addresses = {"w": data.data_ptr(), "s": 0 if scale is None else scale.data_ptr()}
        return {key + suffix: value for key, value in ({"form": form} | addresses).items()}

    def multiplied(self, weight: Weight, k: int, suffix: str = "") -> Fields:
        """The same, and the kernel of its products."""
        fields = self.weight(weight, k, suffix)
        return fields | {"products" + suffix: PRODUCTS[fields["form" + suffix]]()}

    def vector(self, values: Tensor | None) -> int:
        """Where the values lie as float32; 0 for none."""
        return 0 if values is None else self.keep(values, torch.float32).data_ptr()

    def positional(self, values: Tensor, dtype: torch.dtype = torch.float32) -> int:
        if len(values) < self.program.max_length:
            raise ValueError(f"a table of {len(values)} positions for a program of {self.program.max_length}")
        return self.keep(values, dtype).data_ptr()

    def keep(self, values: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """The values without gaps in a dtype, kept alive; converted once."""
        dtype = dtype or values.dtype
        key = id(values), dtype
        if key not in self.converted:
            self.converted[key] = values, values.detach().to(dtype).contiguous()
            self.kept.append(self.converted[key][1])
        return self.converted[key][1]

    def _room(self, count: int) -> None:
        """Ask for scratch of so many floats a thread."""
        self.scratch = max(self.scratch, padded(count) + LANES)


def takes(compressed: Tensor, k: int) -> bool:
    """Whether a compressed weight has k inputs."""
    block = compressed[0].view(torch.uint8)
    return len(block) == size_of_block(k, compressed.itemsize, int(block[NAMES:].view(torch.int32)[0]))


def width(view: View) -> int:
    return view.stop - view.start


def check_aliases(step: Step) -> None:
    """Raises ValueError for a step that overwrites what it reads."""
    both = {view.buffer for view in reads_of(step)} & set(writes_of(step))
    if both:
        raise ValueError(f"a step reads and overwrites {', '.join(sorted(both))}: {step}")


def put_waits(records: list[Record]) -> None:
    """Mark the records before which all threads must have finished what they did since the last wait."""
    reads, writes = set[Hashable](), set[Hashable]()
    for record in records:
        if record.reads & writes or record.writes & (reads | writes):
            record.fields["wait"] = record.waits_from
            reads, writes = set(), set()
        reads, writes = reads | record.reads, writes | record.writes


def put_next(records: list[Record]) -> None:
    """Tell every step which one reads a weight first from it on, and which one does so after it."""
    readers = {i for i, record in enumerate(records) if record.fields["run"] in (dense.linear(), dense.glu())}
    soon = min(readers, default=0)
    for i in reversed(range(len(records))):
        records[i].fields["next"] = soon
        soon = i if i in readers else soon
        records[i].fields["soon"] = soon


def table_of(kind: np.dtype, rows: list[Fields]) -> np.ndarray:
    found = np.zeros(len(rows), kind)
    for i, row in enumerate(rows):
        for name, value in row.items():
            found[name][i] = value
    return found
