"""The transformer that a Spec describes.

Parameters are made when they are first used, so that an operation may need any shape; norms, linear layers and
embeddings are ordinary `nn` modules.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from random_models.mixers import MIXERS, MLPS
from random_models.norms import NORMS
from random_models.operations import OPS
from random_models.spec import VOCAB, Block, Spec


class Model(nn.Module):
    """The transformer that a Spec describes."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.weights, self.parts = nn.ParameterDict(), nn.ModuleDict()
        self.generator = torch.Generator().manual_seed(0)
        with torch.no_grad():
            self(**example(spec))
        self.eval()

    def forward(self, ids: Tensor, mask: Tensor, picks: Tensor, memory: Tensor) -> dict[str, Tensor]:
        return Pass(self, mask, picks, memory).run(ids)


class Pass:
    """One forward pass, with what its operations read besides their argument."""

    def __init__(self, model: Model, mask: Tensor, picks: Tensor, memory: Tensor) -> None:
        self.model, self.spec, self.mask, self.picks, self.memory = model, model.spec, mask, picks, memory
        self.outputs: dict[str, Tensor] = {}

    def weight(self, key: str, *size: int, mean: float = 0.0) -> Tensor:
        key = "_".join([key, *map(str, size)])
        if key not in self.model.weights:
            noise = torch.randn(size, generator=self.model.generator)
            scale = 0.4 if len(size) < 2 else 1.0 / size[-1] ** 0.5
            self.model.weights[key] = nn.Parameter(mean + scale * noise)
        return self.model.weights[key]

    def part(self, key: str, size: int, make: Callable[[], nn.Module]) -> nn.Module:
        """Blocks that share their weights share what is of the same size."""
        key = f"{key}_{size}".replace(".", "_")
        if key not in self.model.parts:
            part = make().eval()
            with torch.no_grad():
                for parameter in part.parameters():
                    noise = torch.randn(parameter.shape, generator=self.model.generator)
                    vector = parameter.ndim < 2
                    parameter.copy_(parameter + 0.4 * noise if vector else noise / parameter.shape[-1] ** 0.5)
                for buffer in (b for b in part.buffers() if b.is_floating_point()):
                    buffer.add_(0.4 * torch.rand(buffer.shape, generator=self.model.generator))
            self.model.parts[key] = part
        return self.model.parts[key]

    def linear(self, key: str, x: Tensor, out: int, bias: bool = False) -> Tensor:
        return self.part(f"{key}_{out}", x.shape[-1], lambda: nn.Linear(x.shape[-1], out, bias=bias))(x)

    def norm(self, key: str, kind: str, x: Tensor) -> Tensor:
        return self.part(f"{key}_{kind}", x.shape[-1], lambda: NORMS[kind](x.shape[-1], self.spec.eps))(x)

    def run(self, ids: Tensor) -> dict[str, Tensor]:
        spec = self.spec
        table = self.weight("table", VOCAB, spec.width)
        x = F.embedding(ids, table)
        if spec.positions == "learned":
            x = x + self.weight("positions", 2 * spec.length, spec.width)[: spec.length]
        elif spec.positions == "fixed":
            x = x + torch.linspace(-1, 1, spec.length)[:, None] * torch.linspace(0, 1, spec.width)
        for i, block in enumerate(spec.blocks):
            for again in range(block.times):
                x = self.block(f"b{i}", i, block, x, again)
        if "stream" in spec.returns:
            self.outputs["stream"] = x
        y = self.norm("final", spec.final_norm, x) if spec.final_norm else x
        if "hidden" in spec.returns:
            self.outputs["hidden"] = y
        if "pooled" in spec.returns:
            self.outputs["pooled"] = torch.tanh(self.linear("pooler", y[:, 0], spec.width, bias=True))
        head = table if spec.tied else self.weight("head", VOCAB, spec.width)
        bias = self.weight("head_bias", VOCAB) if spec.head_bias else None
        return {"logits": F.linear(y, head, bias), **self.outputs}

    def block(self, key: str, number: int, block: Block, x: Tensor, again: int) -> Tensor:
        norm_key = f"b{block.norm_of % (number + 1)}" if block.norm_of is not None else key
        layer = f"b{block.weights_of % (number + 1)}" if block.weights_of is not None else key
        scale = block.multiplier

        def norm(which: str, value: Tensor) -> Tensor:
            return self.norm(f"{norm_key}_{which}", block.norm, value)

        def mix(y: Tensor) -> Tensor:
            return MIXERS[block.mixer](self, f"{layer}_{block.mixer}_{block.kv_heads}", block, y)

        def mlp(y: Tensor) -> Tensor:
            return MLPS[block.mlp](self, f"{layer}_{block.mlp}", block, y)

        if block.placement == "pre":
            y = norm("one", x)
            mixed = mix(y)
            x = x + scale * mixed
            z = norm("two", x)
            x = x + mlp(z)
        elif block.placement == "post":
            mixed = mix(x)
            y = norm("one", x + mixed)
            z = norm("two", y + scale * mlp(y))
            x = z
        elif block.placement == "sandwich":
            y = norm("one", x)
            mixed = mix(y)
            x = x + norm("after", mixed)
            z = norm("two", x)
            x = x + norm("last", scale * mlp(z))
        elif block.placement == "parallel":
            y = z = norm("one", x)
            mixed = mix(y)
            x = x + mixed + scale * mlp(y)
        else:
            y = z = mixed = norm("one", x)
        values = {"norm": y, "second": z, "mixed": mixed, "middle": y}
        for j, chain in enumerate(block.chains):
            value = x if chain.start == "stream" else values[chain.start]
            for i, (op, how) in enumerate(chain.ops):
                value = OPS[op](self, f"{layer}_c{j}_{i}{op}", value, how, x)
                values["middle"] = value if i == 0 else values["middle"]
            if chain.end == "output":
                self.outputs[f"out{number}{j}{again}"] = value
                continue
            if chain.end == "norm":
                value = self.norm(f"{norm_key}_c{j}_end", block.norm, value)
            back = self.back(f"{layer}_c{j}_out", chain.end, value, x)
            x = back if chain.end == "instead" and back.shape == x.shape else x + back
        return x

    def back(self, key: str, end: str, value: Tensor, stream: Tensor) -> Tensor:
        """A value in a shape that may be added to the stream, through a linear layer or as raw as can be."""
        fits = value.ndim == 3 and all(v in (1, s) for v, s in zip(value.shape, stream.shape, strict=True))
        if fits and end in ("raw", "instead"):
            return value
        if value.ndim == 3 and value.shape[:2] == stream.shape[:2]:
            return self.linear(key, value, stream.shape[-1], end == "biased")
        if value.ndim >= 2 and value.shape[0] == stream.shape[0]:
            return self.linear(key, value.flatten(1), stream.shape[-1], end == "biased")[:, None]
        return value.mean()


def example(spec: Spec) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    size = (spec.batch, spec.length)
    mask = torch.ones(size, dtype=torch.bool)
    if spec.padding:
        mask[-1, -2:] = False
    return {
        "ids": torch.randint(0, VOCAB, size, generator=generator),
        "mask": mask,
        "picks": torch.randint(0, spec.length, size, generator=generator),
        "memory": torch.randn(spec.batch, 3, spec.width, generator=generator),
    }
