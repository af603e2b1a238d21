"""A small character language model for trained checks, fed with the English of Python's own documentation."""

import copy
import math
from collections.abc import Callable
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from torch import Tensor, nn

CONTEXT = 64


class Attention(nn.Module):
    def __init__(self, d: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.out = heads, nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.softmax: Callable[[Tensor], Tensor] = lambda scores: scores.softmax(-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        scores = q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])
        future = torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).triu(1)
        mixed = self.softmax(scores.masked_fill(future, -torch.inf)) @ v
        return self.out(mixed.transpose(1, 2).flatten(2))


class CharLM(nn.Module):
    """Pre-norm transformer; `norm(d)` makes its norms."""

    def __init__(self, norm: Callable[[int], nn.Module], d: int = 128, layers: int = 4, heads: int = 4):
        super().__init__()
        self.token, self.place = nn.Embedding(128, d), nn.Embedding(CONTEXT, d)
        self.norms = nn.ModuleList(norm(d) for _ in range(2 * layers + 1))
        self.attention = nn.ModuleList(Attention(d, heads) for _ in range(layers))
        self.mlp = nn.ModuleList(
            nn.Sequential(nn.Linear(d, 4 * d), nn.GELU(), nn.Linear(4 * d, d)) for _ in range(layers)
        )
        self.head = nn.Linear(d, 128)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.token(ids) + self.place.weight[: ids.shape[1]]
        for layer, (attention, mlp) in enumerate(zip(self.attention, self.mlp, strict=True)):
            x = x + attention(self.norms[2 * layer](x))
            x = x + mlp(self.norms[2 * layer + 1](x))
        return self.head(self.norms[-1](x))


def corpus() -> tuple[Tensor, Tensor]:
    """(training, held-out) characters as ids below 128."""
    text = "".join(topics[name] for name in sorted(topics)).encode("ascii", "ignore")
    ids = torch.tensor(list(text))
    return ids[: len(ids) * 9 // 10], ids[len(ids) * 9 // 10 :]


def train(norm: Callable[[int], nn.Module], seed: int = 0, steps: int = 250, **shape: int) -> CharLM:
    torch.manual_seed(seed)
    model, data = CharLM(norm, **shape), corpus()[0]
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2e-3, steps)
    for _ in range(steps):
        starts = torch.randint(len(data) - CONTEXT - 1, (16,))
        rows = torch.stack([data[s : s + CONTEXT + 1] for s in starts])
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@torch.no_grad()
def held_out_loss(model: nn.Module, rows: int = 200) -> float:
    """Mean cross-entropy in nats on the first `rows` held-out stretches."""
    ids = corpus()[1][: rows * (CONTEXT + 1)].view(rows, CONTEXT + 1)
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten()).item()


def with_norms(model: CharLM, build: Callable[[nn.Module], nn.Module]) -> CharLM:
    """A copy with each norm replaced by build(norm)."""
    copied = copy.deepcopy(model)
    copied.norms = nn.ModuleList(build(norm) for norm in copied.norms)
    return copied


def with_softmax(model: CharLM, softmax: Callable[[Tensor], Tensor]) -> CharLM:
    copied = copy.deepcopy(model)
    for attention in copied.attention:
        attention.softmax = softmax
    return copied
