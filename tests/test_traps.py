"""Small modules that are easily taken for others: no rewrite falls into any of these traps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from judge import Judge
from torch import Tensor, nn

from taut.rewrite import STOCK, rewrites

WIDTH, TOKENS = 8, 6
L = nn.Linear


class Trap(nn.Module):
    """A norm, and a body that reads it in a way that is easily taken for another."""

    def __init__(self, body: Callable[[Trap, Tensor], Tensor], norm: nn.Module | None = None, **parts) -> None:
        super().__init__()
        self.body, self.norm = body, norm or nn.RMSNorm(WIDTH, eps=1e-5)
        for name, part in parts.items():
            setattr(self, name, nn.Parameter(0.5 * part) if isinstance(part, Tensor) else part)
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(0.5 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"logits": self.body(self, self.norm(x))}


class Gained(nn.Module):
    """An RMSNorm whose gain is some function of its parameter."""

    def __init__(self, gain: Callable[[Tensor], Tensor], value: float = 1.0, size: int = WIDTH) -> None:
        super().__init__()
        self.gain, self.weight = gain, nn.Parameter(torch.full((size,), value))

    def forward(self, x: Tensor) -> Tensor:
        x = x[..., : len(self.weight)]
        return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-5) * self.gain(self.weight)


class OneForBoth(nn.Module):
    """A LayerNorm whose bias is its gain."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, (WIDTH,), self.weight, self.weight)


def r(*size: int) -> Tensor:
    return torch.randn(size)


def layer_norm() -> nn.Module:
    return nn.LayerNorm(WIDTH)


def transposed_in_storage() -> nn.Module:
    """Two square parameters in one storage, one the transpose of the other: they are not tied."""
    trap = Trap(lambda m, y: F.linear(F.linear(y, m.a), m.b), a=r(8, 8))
    trap.b = nn.Parameter(trap.a.data.t())
    return trap


def twice_masked(m: Trap, y: Tensor) -> Tensor:
    """Two masks that together hide all keys from the first queries: these see all keys alike."""
    least = torch.finfo(torch.float32).min
    scores = y[:, None] @ y[:, None].transpose(-1, -2)
    scores = scores.masked_fill(torch.ones(TOKENS, TOKENS).triu(1).bool(), least)
    return m.a(scores.masked_fill((torch.arange(TOKENS) < 2)[None], least).softmax(-1) @ y[:, None])


def capped_with_a_sink(m: Trap, y: Tensor) -> Tensor:
    """The sink's score is capped like the others."""
    q = y[:, None]
    scores = torch.cat([q @ q.transpose(-1, -2), m.b.view(1, 1, 1, 1).expand(2, 1, TOKENS, 1)], -1)
    return m.a((torch.tanh(scores) * 0.5).softmax(-1)[..., :-1] @ q)


def masked_by_a_batch(m: Trap, y: Tensor) -> Tensor:
    """One row of scores, and a bias for two."""
    q = y[:1, None]
    return m.a((q @ q.transpose(-1, -2) + y[:, None, :, :TOKENS]).softmax(-1) @ q)


def steep(x: Tensor) -> Tensor:
    """ReLU but for the nearest neighbourhood of zero."""
    return x * (x * 1e9).sigmoid()


def bump(x: Tensor) -> Tensor:
    """ReLU but between two of the points at which it is tried."""
    up, down = (x + -0.041) * 1e5, (x + -0.052) * -1e5
    return x.relu() + up.sigmoid() * down.sigmoid()


def every_other(m: Trap, y: Tensor) -> Tensor:
    """A window of one token, which is not the one in its place."""
    return m.b(F.conv1d(m.a(y).mT, m.c[..., None], stride=2, padding=TOKENS // 2)[..., :TOKENS].mT)


def ten(x: Tensor) -> Tensor:
    x = 40.0 * x
    return torch.relu(x) + torch.relu(x + -10.0) * -1.0


# A model, and whether fold_norm may do anything.
TRAPS: dict[str, tuple[Callable[[], nn.Module], bool]] = {
    "cast to integers": (lambda: Trap(lambda m, y: m.a((4 * y).to(torch.int32).to(y.dtype)), a=L(8, 4)), False),
    "cast to eight bits": (lambda: Trap(lambda m, y: m.a(y.to(torch.float8_e4m3fn).to(y.dtype)), a=L(8, 4)), False),
    "cast to bool": (lambda: Trap(lambda m, y: m.a(y.bool().to(y.dtype)), a=L(8, 4)), False),
    "integers normed again": (
        lambda: Trap(lambda m, y: m.a(F.layer_norm((4 * y).int().float(), (8,))), a=L(8, 4)),
        False,
    ),
    "integers normed again, by hand": (
        lambda: Trap(lambda m, y: m.a(m.again((4 * y).int().float())), a=L(8, 4), again=Gained(lambda w: w)),
        False,
    ),
    "integers in a gate": (lambda: Trap(lambda m, y: m.a(F.silu((4 * y).int().float()) * y), a=L(8, 4)), False),
    "a weight cast to integers": (
        lambda: Trap(lambda m, y: F.linear(y, (4 * m.a).to(torch.int32).to(y.dtype)), a=r(4, 8)),
        False,
    ),
    "a weight times a number": (lambda: Trap(lambda m, y: F.linear(y, m.a * 0.5, m.b), a=r(4, 8), b=r(4)), True),
    "a weight times a number, with a bias to fold": (
        lambda: Trap(lambda m, y: F.linear(y, m.a * 0.5, m.b), layer_norm(), a=r(4, 8), b=r(4)),
        False,
    ),
    "a bias times a number": (
        lambda: Trap(lambda m, y: F.linear(y, m.a, m.b * 0.5), layer_norm(), a=r(4, 8), b=r(4)),
        False,
    ),
    "a bias of one element": (
        lambda: Trap(lambda m, y: F.linear(y, m.a, m.b) * F.linear(y, m.c, m.e), a=r(4, 8), b=r(1), c=r(4, 8), e=r(1)),
        False,
    ),
    "a bias of one element, with a bias to fold": (
        lambda: Trap(lambda m, y: torch.addmm(m.b, y.reshape(-1, 8), m.a.t()), layer_norm(), a=r(4, 8), b=r(1)),
        False,
    ),
    "a weight that is its own bias": (lambda: Trap(lambda m, y: F.linear(y, m.a, m.a[0]), a=r(8, 8)), False),
    "a gain that is its own bias": (lambda: Trap(lambda m, y: m.a(y), OneForBoth(), a=L(8, 4)), False),
    "a weight that is a vector": (lambda: Trap(lambda m, y: F.linear(y, m.a), a=r(8)), False),
    "a vector behind a layer": (
        lambda: Trap(lambda m, y: torch.softmax(m.b(y) @ m.a, -1), a=r(4), b=L(8, 4, bias=False)),
        True,
    ),
    "a vector over tokens": (lambda: Trap(lambda m, y: m.a(m.b @ y), b=r(TOKENS), a=L(8, 4)), False),
    "a weight transposed into itself": (lambda: Trap(lambda m, y: y @ m.a.transpose(0, 0), a=r(8, 8)), True),
    "a transpose in the same storage": (transposed_in_storage, True),
    "a rounded gain": (lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: (4 * w).round() / 4), a=L(8, 4)), False),
    "a gain that is rounded where it is tried": (
        lambda: Trap(lambda m, y: m.a(y), Gained(torch.round, size=6), a=L(6, 4)),
        False,
    ),
    "a gain that is clamped where it is not tried": (
        lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: w.clamp(-10, 10), value=20.0), a=L(8, 4)),
        False,
    ),
    "a gain of whole numbers": (
        lambda: Trap(lambda m, y: m.a(y), Gained(lambda w: w.int().float(), value=2.0, size=6), a=L(6, 4)),
        False,
    ),
    "a gain that is read elsewhere": (lambda: Trap(lambda m, y: m.a(y) + m.norm.weight[:4], a=L(8, 4)), False),
    "a norm that is called twice": (
        lambda: Trap(lambda m, y: m.a(y) + m.b(m.norm(m.c(y))), a=L(8, 4), b=L(8, 4), c=L(8, 8)),
        True,
    ),
    "a norm of its own gain": (
        lambda: Trap(
            lambda m, y: m.a(F.rms_norm(m.g.expand(6, 8), (8,), m.g, 1e-5)) + m.b(y).abs(), g=r(8), a=L(8, 4), b=L(8, 4)
        ),
        True,
    ),
    "no tokens": (lambda: Trap(lambda m, y: m.a(torch.cat([y[:, :0], y], 1)), a=L(8, 4)), True),
    "an activation that is ReLU as far as one looks": (
        lambda: Trap(lambda m, y: m.a(ten(m.b(y)) * m.c(y)), a=L(4, 4), b=L(8, 4), c=L(8, 4)),
        True,
    ),
    "an activation that is ReLU but near zero": (
        lambda: Trap(lambda m, y: m.a(steep(m.b(1e-9 * y)) * m.c(y)), a=L(4, 4), b=L(8, 4, bias=False), c=L(8, 4)),
        True,
    ),
    "an activation that is ReLU but between two points": (
        lambda: Trap(lambda m, y: m.a(bump(m.b(y)) * m.c(y)), a=L(4, 4), b=L(8, 4), c=L(8, 4)),
        True,
    ),
    "scores hidden by two masks": (lambda: Trap(twice_masked, a=L(8, 4)), False),
    "a sink whose score is capped": (lambda: Trap(capped_with_a_sink, a=L(8, 4), b=r(1)), False),
    "scores with a batch of their own": (lambda: Trap(masked_by_a_batch, a=L(8, 4)), False),
    "tokens that change places in a convolution of one": (
        lambda: Trap(every_other, a=L(8, 8, bias=False), b=L(8, 4), c=r(8, 8)),
        True,
    ),
}


@pytest.mark.parametrize("name", TRAPS)
def test_falls_into_no_trap(name):
    make, folds = TRAPS[name]
    torch.manual_seed(0)
    judge = Judge(make(), {"x": torch.randn(2, TOKENS, WIDTH)})
    judge.check_all()
    judge.check_alone()
    sites = rewrites()["fold_norm"].find(judge.lifted, STOCK)
    assert any(site.refused is None for site in sites) == folds, sites


class Aliased(nn.Module):
    """A stream, a LayerNorm and a layer; `kept` is a module whose parameter is also that of one of them."""

    def __init__(self, tie: Callable[[Aliased], None]) -> None:
        super().__init__()
        self.table, self.norm = nn.Embedding(9, WIDTH), nn.LayerNorm(WIDTH)
        self.layer, self.second = L(WIDTH, WIDTH), L(WIDTH, WIDTH)
        self.kept: nn.Module = L(WIDTH, WIDTH)
        self.calls_kept = False
        with torch.no_grad():
            for parameter in self.norm.parameters():
                parameter.add_(0.3 * torch.randn_like(parameter))
        tie(self)

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        y = self.norm(self.table(ids))
        total = self.layer(y) + self.second(y)
        return {"logits": total + self.kept(y) if self.calls_kept else total}


def _same_weight(m: Aliased) -> None:
    m.kept.weight = m.layer.weight


def _same_gain(m: Aliased) -> None:
    m.kept = nn.LayerNorm(WIDTH)
    m.kept.weight = m.norm.weight


def _same_table(m: Aliased) -> None:
    m.kept = nn.Embedding(9, WIDTH)
    m.kept.weight = m.table.weight


def _same_module(m: Aliased) -> None:
    m.kept = m.layer


def _held_by_the_caller(m: Aliased) -> None:
    m.register_parameter("kept_bias", m.layer.bias)


def _read_under_both_names(m: Aliased) -> None:
    m.calls_kept = True
    m.kept.weight = m.layer.weight


UNREAD = {
    "a layer that is never called": (_same_weight, {"fold_norm", "merge_linears"}),
    "a norm that is never called": (_same_gain, {"fold_norm"}),
    "an embedding that is never called": (_same_table, {"center_norm_input"}),
    "the same module": (_same_module, set()),
    "a name that the caller holds": (_held_by_the_caller, set()),
    "both names are read": (_read_under_both_names, {"merge_linears"}),
}


@pytest.mark.parametrize("name", UNREAD)
def test_a_name_that_nothing_reads_counts_as_a_reader_that_is_not_known(name):
    tie, refusing = UNREAD[name]
    torch.manual_seed(0)
    judge = Judge(Aliased(tie), {"ids": torch.arange(8).view(2, 4)})
    judge.check_all()
    found = {n: rewrites()[n].find(judge.lifted) for n in ("fold_norm", "center_norm_input", "merge_linears")}
    assert {n for n, sites in found.items() if any(s.refused for s in sites)} == refusing, found
    unread = {n for n, sites in found.items() if any("also known as kept.weight" in (s.refused or "") for s in sites)}
    assert unread == (refusing if "never" in name else set()), found
