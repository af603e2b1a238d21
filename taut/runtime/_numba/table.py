"""What a step looks like to the interpreter: records of numbers and addresses, strides in bytes."""

from __future__ import annotations

import numpy as np

PLAIN, RMS, CENTRED = range(3)
"""Kinds of norm."""

WORDS = """
    run early wait out out_stride n x x_stride k
    form products w s bias form2 products2 w2 s2 bias2
    norm gain norm_bias act residual residual_stride
    b b_stride offset product attend next soon
"""
NUMBERS = "eps scale b_scale cap"
STEP = np.dtype([(word, np.int64) for word in WORDS.split()] + [(number, np.float64) for number in NUMBERS.split()])
"""A step. `run` is the kernel of a thread's share of it, `early` one that may go before without waiting, both of which
take what `play` of interpreter.py gives; `products` is that of the format of its weight. `wait` is the number of rows
from which on what it reads or overwrites may still be in the hands of another thread, if there is any. `next` is the
step that reads a weight after this one, `soon` the first from this one on: memory is fetched early."""

ATTEND_WORDS = """
    q q_stride k k_stride v v_stride turned turned_stride heads kv_heads d dv
    keys values cache_tag append chunk keys_slot keys_head values_slot values_head
    cos sin half interleaved first alibi sinks
    q_norm q_gain q_bias k_norm k_gain k_bias
    peaks totals sums chunks
"""
ATTEND_NUMBERS = "scale cap q_eps k_eps"
ATTENTION = np.dtype(
    [(word, np.int64) for word in ATTEND_WORDS.split()] + [(number, np.float64) for number in ATTEND_NUMBERS.split()]
)
"""What the three steps of an attention share: turn and append, attend by chunks of keys, merge the chunks.
`append` and `chunk` are the kernels of the cache's format, `chunks` is how many chunks a head has room for."""
