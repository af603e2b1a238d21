"""The steps that depend on the token or its position: embedding, rotation and cache, attention."""

from __future__ import annotations

from typing import Any

import numba as nb
import numpy as np

from taut.ops._numba.caches import KEYS
from taut.ops._numba.decode import HIDDEN, chunk, merge
from taut.ops._numba.formats import BFLOAT16, FLOAT16, FLOAT32, INT4_HALF, INT8
from taut.ops._numba.kernels import Address, invoke, jit, kernel, record
from taut.ops._numba.rows import NEAR, fetch, fetch_all
from taut.ops._numba.scalar import array, down, floats, span, up, words
from taut.runtime._numba.dense import scaled, statistics
from taut.runtime._numba.table import ATTENTION, STEP

CHUNK, LONG_CHUNK = 32, 512
"""Keys of a chunk, about, while there are few chunks, and from which on there may be many: memory is read fastest by
long stretches."""
FEW_CHUNKS, MOST_CHUNKS = 8, 32
CACHES = {FLOAT32: np.float32(0), BFLOAT16: np.uint16(0), FLOAT16: np.int16(0)}
"""Formats of a cache, and numbers of the type that they are kept in."""
MOST_ASKED = 1 << 17
"""Bytes of keys and values that a thread asks for early: a part of its second cache."""


@jit
def stored(form, w, s, row, k, i):
    """Entry i of a row of a weight of k columns."""
    if form == FLOAT32:
        return array(w + 4 * row * k, k, np.float32(0))[i]
    if form == BFLOAT16:
        return up(array(w + 2 * row * k, k, np.uint16(0))[i])
    if form == FLOAT16:
        return up(array(w + 2 * row * k, k, np.int16(0))[i])
    if form == INT8:
        return up(array(w + row * k, k, np.int8(0))[i]) * floats(s, row + 1)[row]
    byte = array(w + row * (k // 2), k // 2, np.uint8(0))[i // 32 * 16 + i % 16]
    code = nb.float32(byte >> 4 if i % 32 >= 16 else byte & 15) - nb.float32(8)
    place = row * (k // 32) + i // 32
    if form == INT4_HALF:
        return code * up(array(s, place + 1, np.int16(0))[place])
    return code * floats(s, place + 1)[place]


@kernel
def embed(step, _attention, rows, tokens, positions, _slots, _scratch, part, parts, _after):
    p, tokens, positions = record(step, STEP), words(tokens, rows), words(positions, rows)
    first, last = span(p.n, part, parts)
    for t in range(rows):
        to = floats(p.out + t * p.out_stride, p.n)
        for i in range(first, last):
            to[i] = stored(p.form, p.w, p.s, tokens[t], p.n, i) * nb.float32(p.scale) if p.w else nb.float32(0)
        if p.w2:
            for i in range(first, last):
                to[i] += stored(p.form2, p.w2, p.s2, positions[t] + p.offset, p.n, i)


@jit
def rotated(a, x, d, position):
    """Turn the first features of a head in place."""
    if not a.half:
        return
    cos, sin = floats(a.cos + 4 * position * a.half, a.half), floats(a.sin + 4 * position * a.half, a.half)
    for i in range(a.half):
        left, right = (2 * i, 2 * i + 1) if a.interleaved else (i, i + a.half)
        u, v = x[left], x[right]
        x[left] = u * cos[i] - v * sin[i]
        x[right] = v * cos[i] + u * sin[i]


@jit
def turned(a, source, to, d, norm, eps, gain, bias, position):
    """to = the head at an address, normed and turned."""
    x = floats(source, d)
    mean, alpha = statistics(x, d, norm, eps)
    scaled(x, to, 0, d, mean, alpha, gain, bias)
    rotated(a, to, d, position)


def append_as(tag: Any) -> Address:
    """What writes `count` float32 values into a cache of the tag's type."""

    @kernel
    def append(source, to, count):
        values, places = floats(source, count), array(to, count, tag)
        for i in range(count):
            places[i] = down(values[i], tag)

    return append


@jit
def turn_query(a, t, h, position, to):
    """A head's query normed, turned and scaled."""
    query = floats(to, a.d)
    turned(a, a.q + t * a.q_stride + 4 * h * a.d, query, a.d, a.q_norm, a.q_eps, a.q_gain, a.q_bias, position)
    for i in range(a.d):
        query[i] *= nb.float32(a.scale)


@jit
def append_key(a, t, h, position, slot, scratch):
    """Norm and turn a head's key and put it into the cache."""
    room, size = floats(scratch, a.d), 4 if a.cache_tag == FLOAT32 else 2
    turned(a, a.k + t * a.k_stride + 4 * h * a.d, room, a.d, a.k_norm, a.k_eps, a.k_gain, a.k_bias, position)
    place = a.keys + slot * a.keys_slot + h * a.keys_head + position * a.d * size
    invoke(a.append, (scratch, place, a.d))


@jit
def append_value(a, t, h, position, slot):
    size = 4 if a.cache_tag == FLOAT32 else 2
    place = a.values + slot * a.values_slot + h * a.values_head + position * a.dv * size
    invoke(a.append, (a.v + t * a.v_stride + 4 * h * a.dv, place, a.dv))


@jit
def keys_a_chunk(keys):
    """How many keys a chunk of so many holds: as many as every other, but for the last one's rest."""
    most = min(max(keys // LONG_CHUNK, FEW_CHUNKS), MOST_CHUNKS)
    chunks = min(max((keys + CHUNK // 2) // CHUNK, 1), most)
    return (keys + chunks * KEYS - 1) // (chunks * KEYS) * KEYS


@jit
def most_keys_a_chunk(longest):
    """How many keys a chunk holds at the most, of any number of keys up to the longest."""
    between = LONG_CHUNK + LONG_CHUNK // FEW_CHUNKS + KEYS
    return max(min(between, longest + KEYS), keys_a_chunk(longest))


@jit
def chunks_of(a, position):
    """(first visible key, keys a chunk, chunks) of a row, whatever else is in the batch."""
    lowest = array(a.first, position + 1, np.int64(0))[position] if a.first else 0
    keys = position + 1 - lowest
    step = keys_a_chunk(keys)
    return lowest, step, (keys + step - 1) // step


def attend_to(tag: Any) -> Address:
    """What attends to one chunk of keys in a cache of the tag's type."""

    @kernel
    def attend_chunk(attention, t, kv, c, lowest, step, position, slot, q, scratch, after, after_apart):
        a = record(attention, ATTENTION)
        group, place = a.heads // a.kv_heads, t * a.heads + kv * (a.heads // a.kv_heads)
        first, size = lowest + c * step, array(a.keys, 1, tag).itemsize
        last = min(first + step, position + 1)
        scores = array(scratch, (group, step), np.float32(0))
        peaks = floats(scratch + 4 * group * step, group)
        totals = floats(scratch + 4 * group * (step + 1), group)
        sums = array(scratch + 4 * group * (step + 2), (group, a.dv), np.float32(0))
        arranged = scratch + 4 * group * (step + 2 + a.dv)
        k, v = a.keys + slot * a.keys_slot + kv * a.keys_head, a.values + slot * a.values_slot + kv * a.values_head
        chunk(q, group, a.d, k, a.d * size, v, a.dv * size, a.dv, position + 1, first, last, nb.float32(a.cap),
              a.alibi, kv * group, 0, 0, False, scores, peaks, totals, sums, arranged,
              after, after_apart, tag, np.uint8(0))  # fmt: skip
        for h in range(group):
            at = (place + h) * a.chunks + c
            floats(a.peaks + 4 * at, 1)[0] = peaks[h]
            floats(a.totals + 4 * at, 1)[0] = totals[h]
            to = floats(a.sums + 4 * at * a.dv, a.dv)
            for i in range(a.dv):
                to[i] = sums[h, i]

    return attend_chunk


@jit
def places(a, kv, c, lowest, step, position, slot):
    """(where a chunk's keys begin, how many bytes they are, the same of its values)"""
    first, size = lowest + c * step, 4 if a.cache_tag == FLOAT32 else 2
    keys = min(step, position + 1 - first)
    k = a.keys + slot * a.keys_slot + kv * a.keys_head + first * a.d * size
    v = a.values + slot * a.values_slot + kv * a.values_head + first * a.dv * size
    return k, keys * a.d * size, v, keys * a.dv * size


@kernel
def attend_early(_step, attention, rows, _tokens, positions, slots, _scratch, part, parts, _after):
    """Ask for the first keys and values that a thread will read; those of earlier tokens stand there already."""
    a, positions, slots = record(attention, ATTENTION), words(positions, rows), words(slots, rows)
    room, asked = MOST_ASKED, 0
    begin, end = pieces_of(a, rows, positions, part, parts)
    before = 0
    for t in range(rows):
        lowest, step, chunks = chunks_of(a, positions[t])
        for piece in range(max(begin - before, 0), min(end - before, a.kv_heads * chunks)):
            k, k_bytes, v, v_bytes = places(a, piece // chunks, piece % chunks, lowest, step, positions[t], slots[t])
            for place, size in ((k, k_bytes), (v, v_bytes)):
                if a.cache_tag == FLOAT32:
                    fetch(place, min(size, room - asked))
                else:
                    fetch_all(place, min(size, room - asked))
                asked += min(size, room - asked)
        before += a.kv_heads * chunks


@jit
def pieces_of(a, rows, positions, part, parts):
    """The half-open range of a thread's chunks, of all chunks of keys of all heads of all rows."""
    pieces = 0
    for t in range(rows):
        pieces += a.kv_heads * chunks_of(a, positions[t])[2]
    return span(pieces, part, parts)


@kernel
def attend(_step, attention, rows, _tokens, positions, slots, scratch, part, parts, next_):
    """The chunks of keys of all heads of all rows, shared evenly among the threads; `next_` is what is read then."""
    a, positions, slots = record(attention, ATTENTION), words(positions, rows), words(slots, rows)
    begin, end = pieces_of(a, rows, positions, part, parts)
    group, before = a.heads // a.kv_heads, 0
    queries, room = scratch if rows == 1 else a.turned, scratch + 4 * (a.heads + 1) * a.d
    for t in range(rows):
        lowest, step, chunks = chunks_of(a, positions[t])
        for piece in range(max(begin - before, 0), min(end - before, a.kv_heads * chunks)):
            kv, c, following, after, apart = piece // chunks, piece % chunks, piece + 1, next_, NEAR
            if before + following < end and following < a.kv_heads * chunks:
                found = places(a, following // chunks, following % chunks, lowest, step, positions[t], slots[t])
                after, apart = found[0], found[1] // KEYS
            q = queries + t * a.turned_stride + 4 * kv * group * a.d
            invoke(a.chunk, (attention, t, kv, c, lowest, step, positions[t], slots[t], q, room, after, apart))
        before += a.kv_heads * chunks


@kernel
def turn(_step, attention, rows, _tokens, positions, slots, scratch, part, parts, _after):
    """Turn the queries of all rows, and append their keys and values."""
    a, positions, slots = record(attention, ATTENTION), words(positions, rows), words(slots, rows)
    if rows == 1:
        turn_own(a, positions, slots, scratch, part, parts)
    else:
        turn_all(a, rows, positions, slots, scratch, part, parts)


@jit
def turn_all(a, rows, positions, slots, scratch, part, parts):
    """The same, shared evenly."""
    kv_heads = a.kv_heads if a.k else 0
    each = a.heads + 2 * kv_heads
    first, last = span(rows * each, part, parts)
    for piece in range(first, last):
        t, h = piece // each, piece % each
        if h < a.heads:
            turn_query(a, t, h, positions[t], a.turned + t * a.turned_stride + 4 * h * a.d)
        elif h < a.heads + kv_heads:
            append_key(a, t, h - a.heads, positions[t], slots[t], scratch)
        else:
            append_value(a, t, h - a.heads - kv_heads, positions[t], slots[t])


@jit
def turn_own(a, positions, slots, scratch, part, parts):
    """The same of one row, by every thread for the chunks that it attends to: none waits for what another turns.

    Queries go into scratch; a key and a value are appended by who attends to the last chunk.
    """
    position, slot, group = positions[0], slots[0], a.heads // a.kv_heads
    begin, end = pieces_of(a, 1, positions, part, parts)
    chunks = chunks_of(a, position)[2]
    for kv in range(begin // chunks, (end + chunks - 1) // chunks):
        for h in range(kv * group, (kv + 1) * group):
            turn_query(a, 0, h, position, scratch + 4 * h * a.d)
        if a.k and begin <= (kv + 1) * chunks - 1 < end:
            append_key(a, 0, kv, position, slot, scratch + 4 * a.heads * a.d)
            append_value(a, 0, kv, position, slot)


@kernel
def merge_chunks(step, attention, rows, _tokens, positions, _slots, _scratch, part, parts, _after):
    """The softmax over all chunks of every head."""
    p, a, positions = record(step, STEP), record(attention, ATTENTION), words(positions, rows)
    first, last = span(rows * a.heads, part, parts)
    sinks = floats(a.sinks, a.heads)
    for piece in range(first, last):
        t, h = piece // a.heads, piece % a.heads
        chunks = chunks_of(a, positions[t])[2]
        peaks, totals = floats(a.peaks + 4 * piece * a.chunks, chunks), floats(a.totals + 4 * piece * a.chunks, chunks)
        sums = array(a.sums + 4 * piece * a.chunks * a.dv, (chunks, a.dv), np.float32(0))
        to = floats(p.out + t * p.out_stride + 4 * h * a.dv, a.dv)
        merge(peaks, totals, sums, sinks[h] if a.sinks else HIDDEN, to, np.float32(0))


APPEND = {form: append_as(tag) for form, tag in CACHES.items()}
ATTEND_CHUNK = {form: attend_to(tag) for form, tag in CACHES.items()}
