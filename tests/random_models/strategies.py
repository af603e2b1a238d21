"""How models are drawn: at random, and pointed at what a fact might get wrong."""

from __future__ import annotations

from dataclasses import replace

from hypothesis import strategies as st

from random_models.mixers import MIXERS, MLPS
from random_models.norms import NORMS, USUAL
from random_models.operations import OPS
from random_models.spec import Block, Chain, Spec

MANY = ("move", "reduce", "elementwise", "pair", "parametric", "norm")
"""Operations with more than six ways."""

NAMES = 4 * [*(name for name in OPS if name != "inplace"), "linear", "linear", "norm", "move"] + ["inplace"]
"""Writes in place make a trace take three times as long."""


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    names = draw(st.lists(st.sampled_from(NAMES), min_size=0, max_size=5))
    ops = tuple((name, draw(st.integers(0, 23 if name in MANY else 5))) for name in names)
    start = draw(st.sampled_from(["norm", "norm", "second", "mixed", "stream"]))
    return Chain(start, ops, draw(st.sampled_from(["linear", "linear", "raw", "output"])))


NORM_NAMES = st.sampled_from([*USUAL, *USUAL, *NORMS])


def _ways(**ways: str) -> list[tuple[str, int]]:
    return [(name.replace("_", " "), int(how)) for name, given in ways.items() for how in given.split()]


NEAR = {
    "gain": _ways(
        rope="0 1 2 0 1 2",
        move="0 1 2 3 4 5 7 8 9 10 11",
        reduce="0 1 2 3 5 6 9 10",
        pair="0 2 4 5 8 9 10 11 14 16",
        elementwise="3 4 6 7 13 14 15",
        join="0 1 2 3 4 5",
        mask="0 1 2 3 4",
        parametric="0 1 2 3 5 6 7 8 9 10",
        conv="0 1 2 3 4 5 4 5",
        depthwise="0 3 4 5",
        tied_weight="0 1 2 3 4 5 1 2 3",
        partial_weight="0 1 2 3 4 5",
        scaled_weight="0 1 2 3 4 5",
        one_bias="0 1",
        rank="1 3",
        pick="0 1 2 3 4 5",
    ),
    "mean": _ways(
        move="0 1 3 4 7 10 10 10 11",
        reduce="0 1 3 4 5",
        elementwise="0 0 4 4 7",
        pair="3 8 9 10 14",
        mask="1 4 5",
        parametric="0 1 1 1 2 5 11",
        join="0 1 2 3 4",
        pick="0 5",
        linear="0 3",
        conv="0 4",
        batch_norm="0 1",
        attend="0 1",
        rope="0",
    ),
    "scale": _ways(
        linear="0 3",
        move="0 1 3 4 5 7 8 9 10 11",
        elementwise="0 1 2 3 4 4 5 6 7 8 9 10 11 12 15 16 17 18 20 21",
        reduce="0 1 2 3 4 5 6 7 8 9 11",
        pair="0 1 2 3 4 5 6 7 8 9 10 13 14 15 17",
        join="1 2 3 4 5",
        mask="1 2 3 4 5",
        parametric="0 1 2 3 4 5 6 7 8 9 10 11",
        rope="0 1",
        pick="0 1 2 3 4 5",
        rank="0 1 2 3 4 5",
        conv="0 1 4",
        attend="0 1",
    ),
}
"""Operations through which a norm's gain, a stream's mean or a norm's scalar comes, or might seem to."""
PASS = {
    "gain": _ways(move="2 4 5 6", mask="2", elementwise="6"),
    "mean": _ways(move="2 6", mask="0", elementwise="3 6"),
    "scale": _ways(linear="0 1", move="0 2 3 4 5", elementwise="0 3", pair="0 1", reduce="0 3", join="0 2 2"),
}
"""Operations that mostly let it through."""


@st.composite
def pointed(draw: st.DrawFn, fact: str) -> Chain:
    """An operation near a fact, and few others: from a norm, from a stream, or from a layer behind a norm."""
    some = lambda: draw(st.lists(st.sampled_from(PASS[fact]), max_size=1)) if draw(st.booleans()) else []  # noqa: E731
    near = (*some(), draw(st.sampled_from(NEAR[fact])), *some())
    if fact == "gain":
        return Chain("norm", near, draw(st.sampled_from(["linear", "biased", "biased"])))
    if fact == "mean":
        start = draw(st.sampled_from(["stream", "stream", "stream", "norm"]))
        return Chain(start, near, draw(st.sampled_from(["raw", "norm", "norm", "instead"])))
    start = draw(st.sampled_from(["norm", "norm", "norm", "middle"]))
    layer = ("linear", draw(st.sampled_from([0, 1])))
    return Chain(start, (layer, *near), draw(st.sampled_from(["instead", "norm", "norm", "norm", "linear"])))


USED = {
    "gain": USUAL,
    "mean": ("layer", "layer without bias", "layer var"),
    "scale": ("rms", "rms 1+w", "rms divides", "rms without gain", "layer without bias", "layer without gain"),
}


def plain_probes(fact: str) -> list[Spec]:
    """Every operation near a fact by itself, where it matters most."""
    settings = {
        "gain": (("rms", "norm", (), "linear"), ("layer", "norm", (), "biased")),
        "mean": (("layer", "stream", (), "norm"), ("layer", "stream", (), "raw")),
        "scale": (("rms", "norm", (("linear", 0),), "norm"), ("rms", "norm", (("linear", 0),), "instead")),
    }
    return [
        Spec((Block("probe", norm, "", "", (Chain(start, (*before, op), end),)),), final_norm=norm)
        for op in dict.fromkeys(NEAR[fact])
        for norm, start, before, end in settings[fact]
    ]


@st.composite
def probes(draw: st.DrawFn) -> Spec:
    """A norm, what reads it, and another norm: small models in which little lies between a rule and the outputs."""
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    fact = pick("gain", "mean", "scale", "scale")
    kinds = st.sampled_from(USED[fact])
    chain = draw(pointed(fact))
    block = Block("probe", draw(kinds), "", "", (chain, draw(pointed(fact))) if pick(False, False, True) else (chain,))
    again = replace(block, norm=draw(kinds), weights_of=pick(None, 0), norm_of=pick(None, None, 0))
    return Spec(
        blocks=(block, again) if pick(False, False, False, True) else (block,),
        final_norm=draw(kinds),
        tied=pick(False, False, False, True),
        positions=pick("", "", "learned"),
        returns=pick((), (), (), ("stream",), ("hidden",)),
        width=pick(8, 12),
        batch=pick(2, 2, 2, 1),
        eps=pick(1e-5, 0.1, 1e-30),
        head_bias=draw(st.booleans()),
    )


@st.composite
def blocks(draw: st.DrawFn) -> Block:
    pick, flag = lambda *options: draw(st.sampled_from(options)), st.sampled_from([False, False, True])
    return Block(
        placement=pick("pre", "pre", "post", "sandwich", "parallel"),
        norm=draw(NORM_NAMES),
        mixer=pick("attention", "attention", *MIXERS),
        mlp=pick(*MLPS),
        chains=tuple(draw(st.lists(chains(), max_size=2))),
        kv_heads=pick(1, 2),
        rope=pick("", "half", "interleaved", "partial"),
        qk_norm=pick("", "", "rms", "layer"),
        fused=draw(flag),
        window=draw(flag),
        spelled=draw(flag),
        softcap=draw(flag),
        biases=draw(st.integers(0, 31)),
        norm_of=pick(None, None, None, 0),
        weights_of=pick(None, None, None, 0),
        times=pick(1, 1, 1, 2),
        multiplier=pick(1.0, 1.0, 0.7),
    )


@st.composite
def transformers(draw: st.DrawFn) -> Spec:
    pick = lambda *options: draw(st.sampled_from(options))  # noqa: E731
    first = draw(blocks())
    second = pick(None, None, draw(blocks()), _sharing(first, draw(NORM_NAMES), pick(None, 0)))
    return Spec(
        blocks=(first,) if second is None else (first, second),
        final_norm=pick("", *USUAL),
        tied=pick(False, False, True),
        positions=pick("", "learned", "fixed"),
        returns=tuple(draw(st.lists(st.sampled_from(["hidden", "stream", "pooled"]), max_size=1))),
        padding=draw(st.booleans()),
        width=pick(8, 12),
        length=pick(6, 8),
        batch=pick(2, 2, 2, 1),
        eps=pick(1e-5, 1e-5, 0.1, 1e-30),
        head_bias=pick(False, True),
    )


def _sharing(block: Block, norm: str, norm_of: int | None) -> Block:
    """A block with another's weights, and with its norms or its own."""
    return replace(block, norm=block.norm if norm_of is not None else norm, norm_of=norm_of, weights_of=0)


def specs(whole: int = 1) -> st.SearchStrategy[Spec]:
    """Probes, and among five models `whole` that are transformers."""
    return st.one_of(*(transformers() if i < whole else probes() for i in range(5)))
