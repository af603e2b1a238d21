"""Products of few tokens with a weight in PyTorch's layout, normed on the way: each weight is read once.

The sum of squares is taken from the tile that the product reads, everything is summed in float32, the division and all
that is added come last, and there is one rounding. `matvec` serves one token on the ordinary cores; `product` serves
more with the weight as the large operand of the tensor cores, and takes the squares from the diagonal of x x^T, which
the tensor cores have for nothing. Split products leave float32 partials that `finish` adds up in a fixed order.

With PDL (programmatic dependent launch) a kernel starts while the one before it ends; until `gdc_wait` it only asks
the second-level cache for the first `ahead` inputs of its weights, which is harmless whoever writes them. Asking for
more than that cache holds costs more than it gains (4096 x 28672: 72 us instead of 56), so only the first programs do.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait


@triton.jit
def activate(x, ACT: tl.constexpr):
    """The activations of `taut.ops._activation`, by the same names."""
    if ACT == "silu":
        y = x / (1 + tl.exp(-x))
    elif ACT == "gelu":
        y = 0.5 * x * (1 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x / (1 + tl.exp(-1.5957691216057308 * (x + 0.044715 * x * x * x)))
    elif ACT == "relu":
        y = tl.where(x < 0, 0.0, x)
    elif ACT == "relu2":
        y = tl.where(x < 0, 0.0, x * x)
    elif ACT == "sigmoid":
        y = 1 / (1 + tl.exp(-x))
    elif ACT == "tanh":
        y = 2 / (1 + tl.exp(-2 * x)) - 1
    else:
        tl.static_assert(ACT == "identity", "unknown activation")
        y = x
    return y


FIRST_WAVE = tl.constexpr(264)


@triton.jit
def given(place, at, live):
    """What is stored at these places in float32, or 0 where no tensor is given."""
    found = 0.0
    if place is not None:
        found = tl.load(place + at, mask=live, other=0).to(tl.float32)
    return found


@triton.jit
def prefetch(weight, rows, first, bytes):
    """Ask the second-level cache for `bytes` of each row from column `first` on; all multiples of 16 bytes."""
    tl.inline_asm_elementwise(
        "{ cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0; }",
        "=r,l,r",
        [weight + rows + first, tl.zeros_like(rows).to(tl.int32) + bytes],
        dtype=tl.int32,
        is_pure=False,
        pack=1,
    )


@triton.jit
def finished(dots, ups, squares, bias, residual, tokens, rows, live, n, k, eps, NORM: tl.constexpr, ACT: tl.constexpr):
    """Division, activation, bias and residual of a tile of sums; `tokens`, `rows` and `live` have the tile's shape."""
    if NORM:
        inv = tl.rsqrt(squares / k + eps)
        dots *= inv
        if ups is not None:
            ups *= inv
    if ups is not None:
        dots = activate(dots, ACT) * ups
    if bias is not None:
        dots += tl.load(bias + rows, mask=live, other=0).to(tl.float32)
    if residual is not None:
        dots += tl.load(residual + tokens.to(tl.int64) * n + rows, mask=live, other=0).to(tl.float32)
    return dots


@triton.jit
def matvec(
    x,
    weight,
    up,
    gain,
    bias,
    residual,
    y,
    delta,
    stream,
    n,
    k,
    stride,
    up_stride,
    eps,
    ahead,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    EVEN: tl.constexpr,
    STAGES: tl.constexpr,
    PDL: tl.constexpr,
):
    """One token: BN outputs a program, BK inputs at a time. EVEN: rows begin at multiples of 16 bytes. With a `delta`
    the input is x + delta, rounded, and the first program writes it into `stream`."""
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    places = tl.where(live, rows, 0).to(tl.int64)
    if PDL:
        if EVEN and (ahead > 0) & (tl.program_id(0) < FIRST_WAVE):
            prefetch(weight, places * stride, 0, tl.minimum(k, ahead) * 2)
            if up is not None:
                prefetch(up, places * up_stride, 0, tl.minimum(k, ahead) * 2)
        gdc_launch_dependents()
        gdc_wait()
    dots = tl.zeros([BN, BK], tl.float32)
    ups = tl.zeros([BN, BK], tl.float32)
    squares = tl.zeros([BK], tl.float32)
    for start in tl.range(0, k, BK, num_stages=STAGES):
        cols = start + tl.arange(0, BK)
        seen = cols < k
        both = live[:, None] & seen[None, :]
        at = places[:, None] * stride + cols[None, :]
        w = tl.load(weight + at, mask=both, other=0, eviction_policy="evict_first").to(tl.float32)
        h = tl.load(x + cols, mask=seen, other=0).to(tl.float32)
        if delta is not None:
            summed = (h + tl.load(delta + cols, mask=seen, other=0).to(tl.float32)).to(stream.dtype.element_ty)
            tl.store(stream + cols, summed, mask=seen & (tl.program_id(0) == 0))
            h = summed.to(tl.float32)
        if NORM:
            squares += h * h
        if gain is not None:
            h *= tl.load(gain + cols, mask=seen, other=0).to(tl.float32)
        dots += w * h[None, :]
        if up is not None:
            at = places[:, None] * up_stride + cols[None, :]
            u = tl.load(up + at, mask=both, other=0, eviction_policy="evict_first").to(tl.float32)
            ups += u * h[None, :]
    total = tl.sum(squares, 0)
    other = tl.sum(ups, 1) if up is not None else None
    out = finished(tl.sum(dots, 1), other, total, bias, residual, rows * 0, rows, live, n, k, eps, NORM, ACT)
    tl.store(y + rows, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def tile(source, row, col, rows, cols, stride, BR: tl.constexpr, BC: tl.constexpr, TMA: tl.constexpr):
    """A [BR, BC] tile of a matrix [rows, cols], zeros outside, through a descriptor or by addresses."""
    if TMA:
        block = source.load([row, col])
    else:
        i = row + tl.arange(0, BR)
        j = col + tl.arange(0, BC)
        inside = (i < rows)[:, None] & (j < cols)[None, :]
        block = tl.load(source + i.to(tl.int64)[:, None] * stride + j[None, :], mask=inside, other=0)
    return block


@triton.jit
def product(
    x,
    weight,
    up,
    bias,
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
    eps,
    ahead,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    BN: tl.constexpr,
    BT: tl.constexpr,
    BK: tl.constexpr,
    SPLIT: tl.constexpr,
    TMA: tl.constexpr,
    PDL: tl.constexpr,
):
    """BT tokens times BN outputs a program, over one of SPLIT parts of the inputs.

    With SPLIT > 1 the sums go to `partial`, float32 [SPLIT, 1 or 2 products, tokens, n] and, behind it, the sums of
    squares [SPLIT, tokens]. `weight_place` is the weight's address, which the prefetch needs beside a descriptor.
    """
    row, token, part = tl.program_id(0) * BN, tl.program_id(1) * BT, tl.program_id(2)
    chunks = tl.cdiv(k, BK)
    first = chunks * part // SPLIT
    last = chunks * (part + 1) // SPLIT
    if PDL:
        if TMA and (ahead > 0) & (tl.program_id(0) * SPLIT + part < FIRST_WAVE):
            i = tl.minimum(row + tl.arange(0, BN), n - 1).to(tl.int64)
            span = tl.minimum(tl.minimum(last * BK, k) - first * BK, ahead) * 2
            prefetch(weight_place, i * stride, first * BK, span)
            if up is not None:
                prefetch(up_place, i * up_stride, first * BK, span)
        gdc_launch_dependents()
        gdc_wait()
    dots = tl.zeros([BN, BT], tl.float32)
    ups = tl.zeros([BN, BT], tl.float32)
    gram = tl.zeros([BT, BT], tl.float32)
    for step in range(first, last):
        w = tile(weight, row, step * BK, n, k, stride, BN, BK, TMA)
        h = tile(x, token, step * BK, tokens, k, x_stride, BT, BK, TMA)
        dots = tl.dot(w, h.T, dots)
        if up is not None:
            u = tile(up, row, step * BK, n, k, up_stride, BN, BK, TMA)
            ups = tl.dot(u, h.T, ups)
        if NORM:
            gram = tl.dot(h, h.T, gram)
    i, t = row + tl.arange(0, BN), token + tl.arange(0, BT)
    at, live = t[None, :].to(tl.int64) * n + i[:, None], (i < n)[:, None] & (t < tokens)[None, :]
    square = tl.sum(tl.where(tl.arange(0, BT)[:, None] == tl.arange(0, BT)[None, :], gram, 0.0), 0)
    if SPLIT > 1:
        size = tokens.to(tl.int64) * n
        products: tl.constexpr = 1 if up is None else 2
        tl.store(partial + part * products * size + at, dots, mask=live)
        if up is not None:
            tl.store(partial + (part * products + 1) * size + at, ups, mask=live)
        if NORM and row == 0:
            tl.store(partial + SPLIT * products * size + part * tokens + t, square, mask=t < tokens)
    else:
        other = ups if up is not None else None
        places = t[None, :] + tl.zeros([BN, BT], tl.int32), i[:, None] + tl.zeros([BN, BT], tl.int32)
        out = finished(dots, other, square[None, :], bias, residual, places[0], places[1], live, n, k, eps, NORM, ACT)
        tl.store(y + at, out.to(y.dtype.element_ty), mask=live)


@triton.jit
def finish(
    partial,
    bias,
    residual,
    y,
    tokens,
    n,
    k,
    eps,
    NORM: tl.constexpr,
    ACT: tl.constexpr,
    GLU: tl.constexpr,
    SPLIT: tl.constexpr,
    BN: tl.constexpr,
    PDL: tl.constexpr,
):
    """Add the partials of `product` in their order and finish them: BN outputs of one token a program."""
    if PDL:
        gdc_launch_dependents()
        gdc_wait()
    token = tl.program_id(1)
    rows = tl.program_id(0) * BN + tl.arange(0, BN)
    live = rows < n
    size = tokens.to(tl.int64) * n
    products: tl.constexpr = 2 if GLU else 1
    at = token.to(tl.int64) * n + rows
    dots = tl.zeros([BN], tl.float32)
    ups = tl.zeros([BN], tl.float32)
    total = 0.0
    for part in tl.static_range(SPLIT):
        dots += tl.load(partial + part * products * size + at, mask=live, other=0)
        if GLU:
            ups += tl.load(partial + (part * products + 1) * size + at, mask=live, other=0)
        if NORM:
            total += tl.load(partial + SPLIT * products * size + part * tokens + token)
    other = ups if GLU else None
    out = finished(dots, other, total, bias, residual, rows * 0 + token, rows, live, n, k, eps, NORM, ACT)
    tl.store(y + at, out.to(y.dtype.element_ty), mask=live)
