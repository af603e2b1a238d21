"""What a random model is drawn from; a Spec says everything, and prints as the counterexample."""

from __future__ import annotations

from dataclasses import dataclass

VOCAB, HEADS = 13, 2


@dataclass(frozen=True)
class Chain:
    """Operations in a row, each with a number that says how; `start` is what it reads, `end` what becomes of it.

    At the end it is put into the stream as it is (raw), through a linear layer (linear, or biased), through a norm and
    such a layer (norm), in the stream's place (instead), or it is an output.
    """

    start: str
    ops: tuple[tuple[str, int], ...]
    end: str


@dataclass(frozen=True)
class Block:
    placement: str
    norm: str
    mixer: str
    mlp: str
    chains: tuple[Chain, ...] = ()
    kv_heads: int = HEADS
    rope: str = ""
    qk_norm: str = ""
    fused: bool = False
    window: bool = False
    spelled: bool = False
    softcap: bool = False
    biases: int = 0
    norm_of: int | None = None
    weights_of: int | None = None
    times: int = 1
    multiplier: float = 1.0


@dataclass(frozen=True)
class Spec:
    blocks: tuple[Block, ...]
    final_norm: str = "rms"
    tied: bool = False
    positions: str = ""
    returns: tuple[str, ...] = ()
    padding: bool = False
    width: int = 8
    length: int = 6
    batch: int = 2
    eps: float = 1e-5
    head_bias: bool = False
