"""How the linear ops call the kernels of `products` with one configuration."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from taut.ops._triton import lean, products, rows, sampling
from taut.ops._triton.start import interpreted, options


class Config(NamedTuple):
    """Tile sizes of a kernel (outputs, tokens, inputs), parts of the inputs, pipeline stages and warps.

    `tokens` 0 means the matrix-vector kernel. `ahead` is how many inputs of each row, a multiple of 8, are asked for
    while the kernel before this one ends; with -1 it does not start before that has ended.
    """

    outputs: int
    tokens: int
    inputs: int
    split: int = 1
    stages: int = 1
    warps: int = 4
    ahead: int = 0


def project(
    x: Tensor,
    weight: Tensor,
    y: Tensor,
    config: Config,
    *,
    up: Tensor | None = None,
    act: str = "identity",
    gain: Tensor | None = None,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    eps: float | None = None,
    delta: Tensor | None = None,
    stream: Tensor | None = None,
) -> Tensor:
    """Write act(x weight^T) * (x up^T) + bias + residual of rms_norm(x, gain, eps), where given, into y and return it.

    x: [tokens, k]; weight and up: [n, k]; y and residual: contiguous [tokens, n]; all of one 16-bit dtype but y. With a
    `delta` [tokens, k] the input is x + delta, which is written into a contiguous `stream`.
    """
    if config.tokens == 0:
        return _matvec(x, weight, y, config, up, act, gain, bias, residual, eps, delta, stream)
    if delta is not None or gain is not None:
        x, eps = _summed_and_normed(x, gain, eps, delta, stream), None
    (tokens, k), n, pdl = x.shape, len(weight), config.ahead >= 0 and not interpreted()
    tma = all(even(t) for t in (x, weight, up) if t is not None)
    split = min(config.split, triton.cdiv(k, config.inputs))
    parts = 1 if up is None else 2
    room = (parts * n + 1) * tokens * split if split > 1 else 0
    partial = torch.empty(room, dtype=torch.float32, device=x.device) if room else None
    sources = source(x, config.tokens, config, tma), source(weight, config.outputs, config, tma)
    grid = triton.cdiv(n, config.outputs), triton.cdiv(tokens, config.tokens), split
    products.product[grid](
        *sources,
        None if up is None else source(up, config.outputs, config, tma),
        *(bias, residual, y, partial, weight, up),
        *(tokens, n, k, x.stride(0), weight.stride(0), 0 if up is None else up.stride(0), eps or 0.0),
        *(config.ahead, eps is not None, act, config.outputs, config.tokens, config.inputs, split, tma, pdl),
        **options(config.warps, config.stages, pdl),
    )
    if split > 1:
        products.finish[(triton.cdiv(n, 512), tokens)](
            *(partial, bias, residual, y, tokens, n, k, eps or 0.0, eps is not None, act, up is not None, split),
            *(512, pdl),
            **options(pdl=pdl),
        )
    return y


def _summed_and_normed(
    x: Tensor, gain: Tensor | None, eps: float | None, delta: Tensor | None, stream: Tensor | None
) -> Tensor:
    """A gain, or a sum, stands between the matrix and its tile: a small kernel before the product puts them in."""
    y = None if eps is None else torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rows.stream(x, delta, gain, stream, y, eps=eps or 0.0)
    return stream if y is None else y


def _matvec(x, weight, y, config, up, act, gain, bias, residual, eps, delta, stream) -> Tensor:
    n, k = weight.shape
    pdl = config.ahead >= 0 and not interpreted()
    products.matvec[(triton.cdiv(n, config.outputs),)](
        *(
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
            weight.stride(0),
            0 if up is None else up.stride(0),
        ),
        *(eps or 0.0, config.ahead, eps is not None, act, config.outputs, config.inputs),
        *(all(even(t) for t in (weight, up) if t is not None), config.stages, pdl),
        **options(config.warps, config.stages, pdl),
    )
    return y


def even(t: Tensor) -> bool:
    """Whether every row begins at a multiple of 16 bytes and is one, as the copy engine and the prefetch need it."""
    unit = 16 // t.element_size()
    return t.data_ptr() % 16 == 0 and t.stride(0) % unit == 0 and t.shape[1] % unit == 0 and t.stride(1) == 1


def source(t: Tensor, rows: int, config: Config, tma: bool) -> Tensor | TensorDescriptor:
    """What a product reads tiles of `rows` rows from: a descriptor for the copy engine, or the matrix."""
    return TensorDescriptor.from_tensor(t, [rows, config.inputs]) if tma else t


class Attention(NamedTuple):
    """Keys a tile, programs a multiprocessor, pipeline stages and warps of the decode attention kernel.

    `whole`: a few programs may be left without work, so that none has parts of two heads. In a short call that costs
    more than it saves: the programs of `lean.merge` crowd on the multiprocessors that are left.
    """

    keys: int = 64
    programs: int = 1
    stages: int = 4
    warps: int = 4
    whole: bool = True


FEW_KEYS, MANY_KEYS = Attention(stages=3, whole=False), Attention()
ENOUGH = 2**16
"""Keys of all heads from which more stages in flight pay."""
HEAD = Config(64, 64, 64, 1, 6, 4)
HEAD_OF_FEW = Config(64, 16, 128, 1, 3, 4)


def decode_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lengths: Tensor,
    table: Tensor | None,
    y: Tensor,
    scale: float | None = None,
    config: Attention | None = None,
    processors: int | None = None,
) -> Tensor:
    """Write the attention of q [batch, heads, d] into y and return it; k and v as in the op, features contiguous."""
    (batch, heads, d), kv_heads, pdl = q.shape, k.shape[1], not interpreted()
    config = config or (FEW_KEYS if k[..., 0].numel() <= ENOUGH else MANY_KEYS)
    if processors is None:
        processors = torch.cuda.get_device_properties(q.device).multi_processor_count
    programs, group = processors * config.programs, heads // kv_heads
    scratch = torch.empty(programs, 2, group, d + 2, dtype=torch.float32, device=q.device)
    scale = (d**-0.5 if scale is None else scale) * 1.4426950408889634
    width, rounded = triton.next_power_of_2(max(d, 16)), triton.next_power_of_2(batch)
    parts = min(4, 1 << max(processors // (batch * heads), 1).bit_length() - 1)
    started = options(config.warps, config.stages, pdl)
    lean.attend[(programs,)](
        *(q, k, v, lengths, table, y, scratch, batch, kv_heads),
        *(k.shape[2], 0 if table is None else table.stride(0), *k.stride()[:3], *v.stride()[:3], scale),
        *(rounded, group, triton.next_power_of_2(max(group, 16)), d, width, config.keys, config.whole, pdl),
        **started,
    )
    lean.merge[(batch * kv_heads, group, parts)](
        *(lengths, y, scratch, batch, kv_heads, programs, rounded, group, d, width // parts, config.keys, 32),
        *(config.whole, pdl),
        **options(pdl=pdl),
    )
    return y


def sample_lm_head(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor,
    key: Tensor,
    mask: Tensor | None = None,
    eps: float | None = None,
    config: Config | None = None,
    top_k: int | None = None,
) -> tuple[Tensor, Tensor]:
    """(ids int64 [batch], log of the sum of exp of the logits, float32 [batch]) of x weight^T / temperature.

    x: [batch, k]; weight: [vocabulary, k]; temperature: float32 [batch], 0 for the most likely token; key: int64 [2] on
    the device, seed and step; mask: bool [batch, vocabulary]. With `eps` the logits are rms_norm(x)'s; with `top_k`, at
    most 1024, only so many of the greatest take part, the lower id first among equals.
    """
    best = torch.empty(len(x), dtype=torch.int64, device=x.device)
    log_z = torch.empty(len(x), dtype=torch.float32, device=x.device)
    config = config or (HEAD_OF_FEW if len(x) <= HEAD_OF_FEW.tokens else HEAD)
    if top_k is None:
        noisy, ids, tops, sums = drawn(x, weight, temperature, key, mask, eps, config)
        _best_tile(noisy, ids, tops, sums, best, log_z)
        return best, log_z
    kept, pdl = triton.next_power_of_2(max(top_k, 2)), not interpreted()
    _, found, *_ = drawn(x, weight, temperature, key, mask, eps, config, min(kept, config.outputs))
    found = _greatest(found.flatten(1), kept)
    sampling.draw_kept[(len(x),)](
        *(found, temperature, key, best, log_z, top_k, found.shape[1], pdl), **options(pdl=pdl)
    )
    return best, log_z


def argmax_lm_head(x: Tensor, weight: Tensor, config: Config | None = None) -> Tensor:
    """int64 [batch]: the most likely token of each row of x [batch, k]; a norm before would not change it."""
    best = torch.empty(len(x), dtype=torch.int64, device=x.device)
    config = config or (HEAD_OF_FEW if len(x) <= HEAD_OF_FEW.tokens else HEAD)
    noisy, ids, *_ = drawn(x, weight, None, None, None, None, config)
    _best_tile(noisy, ids, None, None, best, None)
    return best


def drawn(
    x: Tensor,
    weight: Tensor,
    temperature: Tensor | None,
    key: Tensor | None,
    mask: Tensor | None,
    eps: float | None,
    config: Config,
    kept: int = 0,
) -> tuple[Tensor, ...]:
    """What `sampling.draw_tiles` writes."""
    (batch, k), vocabulary, pdl = x.shape, len(weight), config.ahead >= 0 and not interpreted()
    tma = even(x) and even(weight)
    tiles = triton.cdiv(vocabulary, config.outputs)
    parts = torch.empty(3, tiles, batch, dtype=torch.float32, device=x.device)
    size = (batch, tiles, kept) if kept else (tiles, batch)
    ids = torch.empty(size, dtype=torch.int64 if kept else torch.int32, device=x.device)
    sampling.draw_tiles[(tiles, triton.cdiv(batch, config.tokens))](
        *(source(x, config.tokens, config, tma), source(weight, config.outputs, config, tma), weight),
        *(temperature, mask, key, parts[0], ids, parts[1], parts[2], batch, vocabulary, k),
        *(0 if mask is None else mask.stride(0), x.stride(0), weight.stride(0), eps or 0.0, config.ahead),
        *(eps is not None, kept, config.outputs, config.tokens, config.inputs, tma, pdl),
        **options(config.warps, config.stages, pdl),
    )
    return parts[0], ids, parts[1], parts[2]


def _best_tile(noisy, ids, tops, sums, best, log_z) -> None:
    (tiles, batch), pdl = noisy.shape, not interpreted()
    sampling.best_tile[(batch,)](
        *(noisy, ids, tops, sums, best, log_z, tiles, batch, triton.next_power_of_2(tiles), pdl),
        **options(pdl=pdl),
    )


def _greatest(found: Tensor, kept: int) -> Tensor:
    """The `kept` greatest numbers of each row of an int64 [batch, count], in order, by a tree."""
    most, pdl = max(2 * kept, 1024), not interpreted()
    groups = triton.cdiv(found.shape[1], most)
    fewer = torch.empty(len(found), groups * kept, dtype=torch.int64, device=found.device)
    sampling.keep_greatest[(groups, len(found))](
        *(found, fewer, found.shape[1], most, kept, pdl), **options(8 if most > 1024 else 4, pdl=pdl)
    )
    return fewer if groups == 1 else _greatest(fewer, kept)
