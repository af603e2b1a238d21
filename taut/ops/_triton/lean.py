"""Attention of one query a sequence over a ragged cache, with equal work for every program.

Source: Sanovar, Bharadwaj, St. Amant, Ruehle and Rajmohan, LeanAttention, 2024, arXiv:2405.10480 (stream-K tiles over
all heads and sequences). Differs: the partial results are merged by a second kernel in the order of the keys, so that
the result has the same bits in every run; the lengths are read on the device, so that a CUDA graph may be replayed; and
a program asks the second-level cache for its first tile while the kernel before this one ends.

Tiles of KEYS keys are numbered along (sequence, key head, position), and program g of G takes the tiles from T g / G to
T (g + 1) / G. With WHOLE, G is a multiple of the sequences' heads unless that costs a program SPARE tiles: of sequences
of one length no program then has parts of two heads, which is to begin twice. A stretch that covers all keys of a head
is written at once; at most two others a program go to `scratch` [G, 2, GROUP, D + 2]: the sums, the greatest score and
the sum of the weights, of a stretch that begins before the program's first tile (slot 0) or ends behind its last (slot
1). T G must stay below 2^31.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

SPARE = tl.constexpr(2)


@triton.jit
def share(tiles, batch, heads, most_programs, WHOLE: tl.constexpr):
    """(tiles of all heads, programs that get any)."""
    total, programs = tl.sum(tiles, 0) * heads, most_programs
    if WHOLE:
        over = most_programs % (batch * heads)
        whole = most_programs - over
        fewer = (whole > 0) & (total * over <= whole * most_programs * SPARE)
        programs = most_programs - fewer.to(tl.int32) * over
    return total, tl.maximum(tl.minimum(programs, total), 1)


@triton.jit
def find(tiles, at, heads, tile):
    """(sequence, head, first tile of that head, tiles of the head) of a tile."""
    sequence, before = tl.full([], 0, tl.int32), tl.full([], 0, tl.int32)
    if at.shape[0] > 1:
        sequence = tl.sum((tl.cumsum(tiles, 0) * heads <= tile).to(tl.int32), 0)
        before = tl.sum(tl.where(at < sequence, tiles, 0), 0) * heads
    per_head = tl.maximum(tl.sum(tl.where(at == sequence, tiles, 0), 0), 1)
    head = (tile - before) // per_head
    return sequence, head, before + head * per_head, per_head


@triton.jit
def ask(places):
    """Ask the second-level cache for the lines that hold these places."""
    tl.inline_asm_elementwise(
        "{ prefetch.global.L2 [$1]; mov.u32 $0, 0; }", "=r,l", [places], dtype=tl.int32, is_pure=False, pack=1
    )


@triton.jit
def first_tile(lengths, at, key, batch, heads, rows, KEYS: tl.constexpr, WHOLE: tl.constexpr):
    """(sequence, head, positions) that the program begins with. The kernel before may still be writing the lengths:
    whatever they are, the result lies within `batch`, `heads` and `rows`."""
    g, tiles = tl.program_id(0), tl.cdiv(tl.load(lengths + at, mask=at < batch, other=0, volatile=True), KEYS)
    total, programs = share(tiles, batch, heads, tl.num_programs(0), WHOLE)
    first = tl.where(g < programs, total * g // programs, 0)
    sequence, head, head_first, _ = find(tiles, at, heads, first)
    sequence, head = tl.minimum(sequence, batch - 1), tl.minimum(tl.maximum(head, 0), heads - 1)
    position = tl.minimum(tl.maximum((first - head_first) * KEYS + key, 0), rows - 1)
    return sequence.to(tl.int64), head.to(tl.int64), position.to(tl.int64)


@triton.jit
def attend(
    q,
    k,
    v,
    lengths,
    table,
    y,
    scratch,
    batch,
    heads,
    page,
    table_stride,
    k_batch,
    k_head,
    k_row,
    v_batch,
    v_head,
    v_row,
    scale,
    BATCH: tl.constexpr,
    GROUP: tl.constexpr,
    ROWS: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """`heads` key heads with GROUP queries of D features each; ROWS and WIDTH are those rounded up. With a `table` of
    pages [batch, pages], k and v are [pages, heads, page, D]. `scale` includes log2(e)."""
    g = tl.program_id(0)
    at, key = tl.arange(0, BATCH), tl.arange(0, KEYS)
    if PDL and table is None:
        of, which, soon = first_tile(lengths, at, key, batch, heads, page, KEYS, WHOLE)
        size: tl.constexpr = 1024 // k.dtype.element_ty.primitive_bitwidth  # numbers in 128 bytes
        line = tl.arange(0, (WIDTH + size - 1) // size)[None, :] * size
        ask(k + of * k_batch + which * k_head + soon[:, None] * k_row + line)
        ask(v + of * v_batch + which * v_head + soon[:, None] * v_row + line)
    if PDL:
        gdc_wait()
        # only now, so that `merge` may read the lengths before this kernel has ended
        gdc_launch_dependents()
    all_lengths = tl.load(lengths + at, mask=at < batch, other=0)
    tiles = tl.cdiv(all_lengths, KEYS)
    total, programs = share(tiles, batch, heads, tl.num_programs(0), WHOLE)
    current = tl.where(g < programs, total * g // programs, 0)
    stop = tl.where(g < programs, total * (g + 1) // programs, 0)
    row, feature = tl.arange(0, ROWS), tl.arange(0, WIDTH)
    while current < stop:
        sequence, head, head_first, per_head = find(tiles, at, heads, current)
        length = tl.sum(tl.where(at == sequence, all_lengths, 0), 0)
        last = tl.minimum(stop, head_first + per_head)
        place = (sequence * heads + head) * GROUP
        live = (row < GROUP)[:, None] & (feature < D)[None, :]
        k_base = k + sequence.to(tl.int64) * k_batch + head.to(tl.int64) * k_head
        v_base = v + sequence.to(tl.int64) * v_batch + head.to(tl.int64) * v_head
        q_at = q + (place + row)[:, None] * D + feature[None, :]
        greatest = tl.full([ROWS], float("-inf"), tl.float32)
        weight = tl.zeros([ROWS], tl.float32)
        sums = tl.zeros([ROWS, WIDTH], tl.float32)
        for tile in range(current - head_first, last - head_first):
            position = tile * KEYS + key
            seen = position < length
            both = seen[:, None] & (feature < D)[None, :]
            if table is not None:
                block = tl.load(table + sequence * table_stride + position // page, mask=seen, other=0).to(tl.int64)
                k_at = k + block * k_batch + head * k_head + (position % page) * k_row
                v_at = v + block * v_batch + head * v_head + (position % page) * v_row
            else:
                k_at = k_base + position.to(tl.int64) * k_row
                v_at = v_base + position.to(tl.int64) * v_row
            keys = tl.load(k_at[:, None] + feature[None, :], mask=both, other=0)
            values = tl.load(v_at[:, None] + feature[None, :], mask=both, other=0)
            # beside the tiles, by an address that looks new each time: before the loop all else would wait for it
            query = tl.load(q_at + tl.multiple_of(tl.minimum(tile, 0), 16), mask=live, other=0)
            scores = tl.where(seen[None, :], tl.dot(query, keys.T) * scale, float("-inf"))
            higher = tl.maximum(greatest, tl.max(scores, 1))
            shrink = tl.exp2(greatest - higher)
            p = tl.exp2(scores - higher[:, None])
            weight = weight * shrink + tl.sum(p, 1)
            sums = tl.dot(p.to(values.dtype), values, sums * shrink[:, None])
            greatest = higher
        starts, closes = current == head_first, last == head_first + per_head
        if starts and closes:
            out = y + (place + row)[:, None] * D + feature[None, :]
            tl.store(out, (sums / weight[:, None]).to(y.dtype.element_ty), mask=live)
        else:
            slot = tl.where(starts, 1, 0)
            to = scratch + ((g * 2 + slot) * GROUP + row) * (D + 2)
            tl.store(to[:, None] + feature[None, :], sums, mask=live)
            tl.store(to + D, greatest, mask=row < GROUP)
            tl.store(to + D + 1, weight, mask=row < GROUP)
        current = last


@triton.jit
def merge(
    lengths,
    y,
    scratch,
    batch,
    heads,
    most_programs,
    BATCH: tl.constexpr,
    GROUP: tl.constexpr,
    D: tl.constexpr,
    WIDTH: tl.constexpr,
    KEYS: tl.constexpr,
    PARTS: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """Join the stretches of WIDTH features of one query head, PARTS at a time in the order of the keys; a sequence of
    no keys gives 0."""
    sequence, head, member = tl.program_id(0) // heads, tl.program_id(0) % heads, tl.program_id(1)
    at, feature = tl.arange(0, BATCH), tl.program_id(2) * WIDTH + tl.arange(0, WIDTH)
    tiles = tl.cdiv(tl.load(lengths + at, mask=at < batch, other=0), KEYS)
    total, programs = share(tiles, batch, heads, most_programs, WHOLE)
    own = tl.sum(tl.where(at == sequence, tiles, 0), 0)
    first = tl.sum(tl.where(at < sequence, tiles, 0), 0) * heads + head * own
    g0 = ((first + 1) * programs - 1) // tl.maximum(total, 1)
    g1 = ((first + own) * programs - 1) // tl.maximum(total, 1)
    out = y + (tl.program_id(0) * GROUP + member) * D + feature
    if PDL:
        # Of several sequences some programs have parts to join and others none. The next call's would crowd where none
        # are, so they come while this call's all hold their places. Of one sequence they come only now: what they ask
        # for ahead would stand in the way of this call's keys.
        if BATCH > 1:
            gdc_launch_dependents()
        gdc_wait()
        if BATCH == 1:
            gdc_launch_dependents()
    if own == 0:
        tl.store(out, tl.zeros([WIDTH], y.dtype.element_ty), mask=feature < D)
    elif g1 > g0:
        greatest = tl.full([], float("-inf"), tl.float32)
        weight = tl.full([], 0.0, tl.float32)
        sums = tl.zeros([WIDTH], tl.float32)
        for start in range(g0, g1 + 1, PARTS):
            g = start + tl.arange(0, PARTS)
            live = g <= g1
            slot = tl.where(total * g // programs <= first, 1, 0)
            place = scratch + ((g * 2 + slot) * GROUP + member) * (D + 2)
            high = tl.load(place + D, mask=live, other=float("-inf"))
            portion = tl.load(place + D + 1, mask=live, other=0)
            part = tl.load(place[:, None] + feature[None, :], mask=live[:, None] & (feature < D)[None, :], other=0)
            higher = tl.maximum(greatest, tl.max(high, 0))
            shrink, factor = tl.exp2(greatest - higher), tl.exp2(high - higher)
            weight = weight * shrink + tl.sum(portion * factor, 0)
            sums = sums * shrink + tl.sum(part * factor[:, None], 0)
            greatest = higher
        tl.store(out, (sums / weight).to(y.dtype.element_ty), mask=feature < D)
