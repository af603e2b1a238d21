"""Products of one row, or of a few, with a weight in PyTorch's layout, with the norm before them and all that follows.

`one` serves a row on the ordinary cores. What no kernel writes, the first inputs of its weights, it loads into
registers before it waits for the kernel before it (programmatic dependent launch): a chain of small products then
costs little more than the waiting. `many` serves more rows with the weight as the large operand of the tensor cores;
`join` adds up the parts of a product that was split along its inputs, in their order. Sums are float32, rounded once.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

from taut.ops._triton.products import FIRST_WAVE, activate, given, prefetch, tile

PLAIN, RMS, FULL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)
"""No norm; a root mean square with or without a gain, divided by at the end; any other, applied to the inputs."""


@triton.jit
def tanh(x):
    """To a few units in the last place, near zero too."""
    square = x * x
    near = 1 - square * (1 / 3 - square * (2 / 15 - square * (17 / 315 - square * (62 / 2835))))
    t = tl.exp(-2 * tl.abs(x))
    far = (1 - t) / (1 + t)
    return tl.where(square < 0.0625, x * near, tl.where(x < 0, -far, far))


@triton.jit
def finished(dots, ups, bias, up_bias, rows, live, scale, cap, ACT: tl.constexpr, CAP: tl.constexpr):
    """What follows a product but for its residual; `rows` are the outputs' numbers, of the tile's shape."""
    if bias is not None:
        dots += tl.load(bias + rows, mask=live, other=0)
    y = activate(dots, ACT)
    if ups is not None:
        if up_bias is not None:
            ups += tl.load(up_bias + rows, mask=live, other=0)
        y *= ups
    y *= scale
    if CAP:
        y = cap * tanh(y / cap)
    return y


@triton.jit
def statistics(x, k, eps, CENTRED: tl.constexpr, BK: tl.constexpr):
    """(mean, or 0; 1 / the root of the mean square of what it leaves, and eps) of a row."""
    cols = tl.arange(0, BK)
    mean = 0.0
    if CENTRED:
        total = tl.zeros([BK], tl.float32)
        for start in range(0, k, BK):
            total += tl.load(x + start + cols, mask=start + cols < k, other=0).to(tl.float32)
        mean = tl.sum(total, 0) / k
    squares = tl.zeros([BK], tl.float32)
    for start in range(0, k, BK):
        h = tl.load(x + start + cols, mask=start + cols < k, other=0).to(tl.float32) - mean
        h = tl.where(start + cols < k, h, 0.0)
        squares += h * h
    return mean, tl.rsqrt(tl.sum(squares, 0) / k + eps)


@triton.jit
def row_of(x, parts, first, k, DV: tl.constexpr, PARTS: tl.constexpr, BK: tl.constexpr):
    """BK inputs of a row from `first` on; with PARTS, x holds [PARTS, k] stretches of attention to be weighed by
    `parts` [PARTS, heads], the logarithms to base 2 of their sums. DV is a power of two then, and divides BK."""
    if PARTS == 0:
        cols = first + tl.arange(0, BK)
        h = tl.load(x + cols, mask=cols < k, other=0).to(tl.float32)
    else:  # a head a row, so that its weights are computed once and not for every feature
        heads, head = k // DV, first // DV + tl.arange(0, BK // DV)
        seen, at = head < heads, head[:, None] * DV + tl.arange(0, DV)[None, :]
        logs, values = (), ()
        for part in tl.static_range(PARTS):  # all are on their way before any is looked at
            logs += (tl.load(parts + part * heads + head, mask=seen, other=0),)
            values += (tl.load(x + part * k + at, mask=seen[:, None], other=0),)
        top = logs[0]
        for part in tl.static_range(1, PARTS):
            top = tl.maximum(top, logs[part])
        sums = tl.zeros(at.shape, tl.float32)
        total = tl.zeros(head.shape, tl.float32)
        for part in tl.static_range(PARTS):
            weight = tl.exp2(logs[part] - top)
            # a stretch of no keys has left anything there
            sums += tl.where((weight > 0)[:, None], weight[:, None] * values[part], 0.0)
            total += weight
        h = tl.reshape(sums / total[:, None], (BK,))
    return h


@triton.jit
def applied(h, gain, shift, gains, shifts, mean, inv, cols, k, NORM: tl.constexpr):
    """What of a norm is applied to the inputs themselves."""
    if NORM == FULL:
        h = tl.where(cols < k, (h - mean) * inv, 0.0)
    if gain is not None:
        h *= gains
    if shift is not None:
        h += shifts
    return h


@triton.jit
def add_two(a, b, c, d):
    return a + c, b + d


@triton.jit
def add_three(a, b, c, d, e, f):
    return a + d, b + e, c + f


@triton.jit
def block(weight, places, live, cols, k, stride):
    mask = live[:, None] & (cols < k)[None, :]
    return tl.load(weight + places[:, None] * stride + cols[None, :], mask=mask, other=0)


@triton.jit
def one(
    x,
    parts,
    weight,
    up,
    gain,
    shift,
    bias,
    up_bias,
    residual,
    y,
    n,
    k,
    stride,
    up_stride,
    eps,
    scale,
    cap,
    ahead,
    NORM: tl.constexpr,
    CENTRED: tl.constexpr,
    ACT: tl.constexpr,
    CAP: tl.constexpr,
    DV: tl.constexpr,
    PARTS: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    TAIL: tl.constexpr,
    WHOLE: tl.constexpr,
    PDL: tl.constexpr,
):
    """One row: BN outputs a program, BK inputs at a time. WHOLE: there are no more than BK + TAIL, held at once. In one
    tile, the squares are added up together with the products: the threads meet once.

    `ahead` inputs of each row behind the first BK, a multiple of 8, are asked for before the wait.
    """
    TOGETHER: tl.constexpr = WHOLE and TAIL == 0 and NORM == RMS
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    places = tl.where(live, rows, 0).to(tl.int64)
    cols = tl.arange(0, BK)
    w = block(weight, places, live, cols, k, stride)
    if up is not None:
        u = block(up, places, live, cols, k, up_stride)
    if TAIL > 0:
        rest = BK + tl.arange(0, TAIL)
        w1 = block(weight, places, live, rest, k, stride)
        if up is not None:
            u1 = block(up, places, live, rest, k, up_stride)
    if WHOLE:
        gains, shifts = given(gain, cols, cols < k), given(shift, cols, cols < k)
        if TAIL > 0:
            gains1, shifts1 = given(gain, rest, rest < k), given(shift, rest, rest < k)
    if PDL:
        if not WHOLE and (ahead > 0) & (tl.program_id(0) < FIRST_WAVE):
            prefetch(weight, places * stride, BK, tl.minimum(k - BK, ahead) * 2)
            if up is not None:
                prefetch(up, places * up_stride, BK, tl.minimum(k - BK, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
    if residual is not None:
        added = tl.load(residual + rows, mask=live, other=0).to(tl.float32)
    mean, inv = tl.full([], 0.0, tl.float32), tl.full([], 1.0, tl.float32)
    if WHOLE:
        h = row_of(x, parts, 0, k, DV, PARTS, BK)
        if TAIL > 0:
            h1 = row_of(x, parts, BK, k, DV, PARTS, TAIL)
        if CENTRED:
            mean = tl.sum(h, 0)
            if TAIL > 0:
                mean += tl.sum(h1, 0)
            mean /= k
        if NORM != PLAIN and not TOGETHER:
            left = tl.where(cols < k, h - mean, 0.0)
            squared = tl.sum(left * left, 0)
            if TAIL > 0:
                left1 = tl.where(rest < k, h1 - mean, 0.0)
                squared += tl.sum(left1 * left1, 0)
            inv = tl.rsqrt(squared / k + eps)
        raw = h
        h = applied(h, gain, shift, gains, shifts, mean, inv, cols, k, NORM)
        dots = w.to(tl.float32) * h[None, :]
        if TOGETHER:
            squares = tl.broadcast_to((raw * raw)[None, :], dots.shape)
            if up is not None:
                total, others, squared = tl.reduce((dots, u.to(tl.float32) * h[None, :], squares), 1, add_three)
            else:
                total, squared = tl.reduce((dots, squares), 1, add_two)
                others = total
            inv = tl.rsqrt(squared / k + eps)
        else:
            total = tl.sum(dots, 1)
            others = total
            if up is not None:
                others = tl.sum(u.to(tl.float32) * h[None, :], 1)
        if TAIL > 0:
            h1 = applied(h1, gain, shift, gains1, shifts1, mean, inv, rest, k, NORM)
            total += tl.sum(w1.to(tl.float32) * h1[None, :], 1)
            if up is not None:
                others += tl.sum(u1.to(tl.float32) * h1[None, :], 1)
    else:
        if NORM == FULL:
            mean, inv = statistics(x, k, eps, CENTRED, BK)
        dots = tl.zeros([BN, BK], tl.float32)
        ups = tl.zeros([BN, BK], tl.float32)
        squares = tl.zeros([BK], tl.float32)
        for start in range(0, k, BK):
            at = start + cols
            h = row_of(x, parts, start, k, DV, PARTS, BK)
            if NORM == RMS:
                squares += h * h
            gains, shifts = given(gain, at, at < k), given(shift, at, at < k)
            h = applied(h, gain, shift, gains, shifts, mean, inv, at, k, NORM)
            dots += w.to(tl.float32) * h[None, :]
            if up is not None:
                ups += u.to(tl.float32) * h[None, :]
                u = block(up, places, live, at + BK, k, up_stride)
            w = block(weight, places, live, at + BK, k, stride)
        total, others = tl.sum(dots, 1), tl.sum(ups, 1)
        if NORM == RMS:
            inv = tl.rsqrt(tl.sum(squares, 0) / k + eps)
    if NORM == RMS:
        total *= inv
        others *= inv
    out = finished(total, others if up is not None else None, bias, up_bias, rows, live, scale, cap, ACT, CAP)
    if residual is not None:
        out += added
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def many(
    x,
    weight,
    up,
    bias,
    up_bias,
    residual,
    y,
    partial,
    weight_place,
    up_place,
    tokens,
    n,
    k,
    x_stride,
    stride,
    up_stride,
    residual_stride,
    y_stride,
    eps,
    scale,
    cap,
    ahead,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    CAP: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """BT rows times BN outputs a program, over one of SPLIT parts of the inputs; the norm is PLAIN, or RMS of no gain.

    With SPLIT > 1 the sums go to `partial`, float32 [SPLIT, 1 or 2 products, tokens, n] and, behind it, the sums of
    squares [SPLIT, tokens]. `weight_place` is the weight's address, which the prefetch needs beside a descriptor.
    """
    row, token, part = tl.program_id(0) * BN, tl.program_id(1) * BT, tl.program_id(2)
    chunks = tl.cdiv(k, BK)
    first, last = chunks * part // SPLIT, chunks * (part + 1) // SPLIT
    if PDL:
        if TMA and (ahead > 0) & (tl.program_id(0) * SPLIT + part < FIRST_WAVE):
            places = tl.minimum(row + tl.arange(0, BN), n - 1).to(tl.int64)
            span = tl.minimum(tl.minimum(last * BK, k) - first * BK, ahead) * 2
            prefetch(weight_place, places * stride, first * BK, span)
            if up is not None:
                prefetch(up_place, places * up_stride, first * BK, span)
        gdc_launch_dependents()
        gdc_wait()
    dots = tl.zeros([BN, BT], tl.float32)
    ups = tl.zeros([BN, BT], tl.float32)
    gram = tl.zeros([BT, BT], tl.float32)
    for step in range(first, last):
        w = tile(weight, row, step * BK, n, k, stride, BN, BK, TMA)
        h = tile(x, token, step * BK, tokens, k, x_stride, BT, BK, TMA)
        dots = tl.dot(w.to(h.dtype), h.T, dots, input_precision="ieee")
        if up is not None:
            u = tile(up, row, step * BK, n, k, up_stride, BN, BK, TMA)
            ups = tl.dot(u.to(h.dtype), h.T, ups, input_precision="ieee")
        if NORM == RMS:
            gram = tl.dot(h, h.T, gram, input_precision="ieee")
    i, t = row + tl.arange(0, BN), token + tl.arange(0, BT)
    live = (i < n)[:, None] & (t < tokens)[None, :]
    squares = tl.sum(tl.where(tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :], gram, 0.0), 0)
    if SPLIT > 1:
        at, size = t[None, :].to(tl.int64) * n + i[:, None], tokens.to(tl.int64) * n
        products: tl.constexpr = 1 if up is None else 2
        tl.store(partial + part * products * size + at, dots, mask=live)
        if up is not None:
            tl.store(partial + (part * products + 1) * size + at, ups, mask=live)
        if NORM == RMS and row == 0:
            tl.store(partial + SPLIT * products * size + part * tokens + t, squares, mask=t < tokens)
    else:
        if NORM == RMS:
            factor = tl.rsqrt(squares / k + eps)[None, :]
            dots *= factor
            ups *= factor
        rows = i[:, None] + tl.zeros([BN, BT], tl.int32)
        out = finished(dots, ups if up is not None else None, bias, up_bias, rows, live, scale, cap, ACT, CAP)
        if residual is not None:
            at = t[None, :].to(tl.int64) * residual_stride + i[:, None]
            out += tl.load(residual + at, mask=live, other=0).to(tl.float32)
        tl.store(y + t[None, :].to(tl.int64) * y_stride + i[:, None], out.to(y.dtype.element_ty), mask=live)


@triton.jit
def join(
    partial,
    bias,
    up_bias,
    residual,
    y,
    tokens,
    n,
    k,
    residual_stride,
    y_stride,
    eps,
    scale,
    cap,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    CAP: tl.constexpr,
    GLU: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the parts of `many` in their order and finish them: BN outputs of one row a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1).to(tl.int64)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    size = tokens.to(tl.int64) * n
    products: tl.constexpr = 2 if GLU else 1
    dots = tl.zeros([BN], tl.float32)
    ups = tl.zeros([BN], tl.float32)
    squares = 0.0
    for part in tl.static_range(SPLIT):
        at = partial + part * products * size + token * n + rows
        dots += tl.load(at, mask=live, other=0)
        if GLU:
            ups += tl.load(at + size, mask=live, other=0)
        if NORM == RMS:
            squares += tl.load(partial + SPLIT * products * size + part * tokens + token)
    if NORM == RMS:
        factor = tl.rsqrt(squares / k + eps)
        dots *= factor
        ups *= factor
    out = finished(dots, ups if GLU else None, bias, up_bias, rows, live, scale, cap, ACT, CAP)
    if residual is not None:
        out += tl.load(residual + token * residual_stride + rows, mask=live, other=0).to(tl.float32)
    tl.store(y + token * y_stride + rows, out.to(y.dtype.element_ty), mask=live)
