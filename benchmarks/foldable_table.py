"""The table of foldable norms in docs/normalization.md: what `taut inspect --norms` says of six kinds of models."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from taut.graph import Graph
from taut.lift import lift
from taut.norm_report import DIVISION, GAIN, MEAN, NormReport, norm_report
from taut.tracing import trace

IDS = torch.arange(3, 11).reshape(2, 4)


class NormedLSTM(nn.Module):
    """An LSTM cell with a LayerNorm on each sum of gates and on the state, unrolled (Ba et al., arXiv:1607.06450)."""

    def __init__(self, width: int = 16) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, width), nn.Linear(width, 20)
        self.from_input, self.from_state = nn.Linear(width, 4 * width), nn.Linear(width, 4 * width)
        self.norm_input, self.norm_state = nn.LayerNorm(4 * width), nn.LayerNorm(4 * width)
        self.norm_cell = nn.LayerNorm(width)

    def forward(self, input_ids: Tensor) -> Tensor:
        x = self.table(input_ids)
        state = cell = torch.zeros_like(x[:, 0])
        for t in range(input_ids.shape[1]):
            gates = self.norm_input(self.from_input(x[:, t])) + self.norm_state(self.from_state(state))
            enter, keep, leave, new = gates.chunk(4, -1)
            cell = keep.sigmoid() * cell + enter.sigmoid() * new.tanh()
            state = leave.sigmoid() * self.norm_cell(cell).tanh()
        return self.head(state)


def kinds() -> dict[str, tuple[nn.Module, dict[str, Tensor]]]:
    """Each kind with a model of a few layers, random, and inputs for it."""
    import transformers as t

    torch.manual_seed(0)
    pixels = {"pixel_values": torch.randn(2, 3, 32, 32)}
    tokens = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
    sizes: Any = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    own: Any = {"num_labels": 20, "image_size": 32}
    gpt2 = t.GPT2Config(n_embd=16, n_head=2, n_layer=2, vocab_size=20, n_positions=8, bos_token_id=1, eos_token_id=2)
    gpt2.tie_word_embeddings = False
    swin = t.SwinConfig(patch_size=4, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4, **own)
    conv = t.ConvNextConfig(hidden_sizes=[16, 32], depths=[2, 2], num_stages=2, **own)
    return {
        "GPT-2": (t.GPT2LMHeadModel(gpt2), tokens),
        "BERT": (t.BertForMaskedLM(t.BertConfig(vocab_size=20, tie_word_embeddings=False, **sizes)), tokens),
        "ViT": (t.ViTForImageClassification(t.ViTConfig(patch_size=8, **own, **sizes)), pixels),
        "Swin": (t.SwinForImageClassification(swin), pixels),
        "ConvNeXt": (t.ConvNextForImageClassification(conv), pixels),
        "LSTM with norms": (NormedLSTM(), {"input_ids": IDS}),
    }


def graphs() -> Iterator[tuple[str, Graph, Graph, dict[str, Tensor]]]:
    """Each kind as traced and as lifted, no gain one and no bias zero, and its inputs. Logits alone, heads untied."""
    for kind, (model, inputs) in kinds().items():
        for parameter in model.parameters():
            if parameter.ndim == 1:
                parameter.data += 0.3 * torch.randn_like(parameter)
        raw = trace(model.eval(), inputs, outputs="all" if isinstance(model, NormedLSTM) else "logits")
        yield kind, raw, lift(raw), inputs


def reports() -> dict[str, list[NormReport]]:
    return {kind: norm_report(lifted) for kind, _, lifted, _ in graphs()}


def role(where: str) -> str:
    """A norm's module without the numbers of layers and calls, the last two parts."""
    return ".".join(re.sub(r"\.\d+|#\d+", "", where).split(".")[-2:])


def part(report: NormReport, name: str) -> str:
    """What removes a part of a norm, in a cell: a rewrite, or nothing."""
    return f"`{report.removed[name]}`" if name in report.removed else "stays" if name in report.kept else "none"


def foldable_table() -> str:
    """A row for each kind of model and role of a norm in it, with a reason for what stays."""
    lines = [
        "| model | norm | gain and bias | mean | division | why, where something stays |",
        "|---|---|---|---|---|---|",
    ]
    for kind, found in reports().items():
        rows: dict[tuple[str, ...], list[NormReport]] = {}
        for report in found:
            parts = (part(report, name) for name in (GAIN, MEAN, DIVISION))
            rows.setdefault((role(report.where), *parts), []).append(report)
        for (name, *parts), same in rows.items():
            why = "; ".join(same[0].kept.values())
            lines.append("| " + " | ".join((kind, f"`{name}` ({len(same)})", *parts, why)) + " |")
    return "\n".join(lines)
