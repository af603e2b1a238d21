"""Example inputs made up from the signature of `forward` and the configuration."""

from __future__ import annotations

import inspect
import itertools
import math
from typing import Any

import torch
from torch import Tensor, nn

from taut.shrink.sizes import VOCAB, ints, role_of, tree

LENGTH = 13


def example_inputs(
    model: nn.Module, batch: int = 2, length: int = LENGTH, seed: int = 0, device: str | None = None
) -> dict[str, Tensor]:
    """Keyword inputs made up from the signature of `forward` and the configuration, on `device` or the model's own.

    Text alone where the class takes it. Row 1 of `attention_mask` ends in padding; no row is all padding. Where names
    leave the layout open (is it frames x bins or bins x frames?), the first one with which the model runs is taken.
    """
    inputs = _Inputs(model, batch, length, seed)
    options = inputs.options()
    chosen = next((o for o in options if inputs.runs(o)), options[0]) if len(options) > 1 else options[0]
    if device is not None:
        inputs.device = torch.device(device)
    return inputs.make(chosen)


Main = tuple[tuple[str, tuple[int, ...]], ...]


class _Inputs:
    """Makes inputs for one model. A main input is a name with a shape behind the batch; () means token ids."""

    def __init__(self, model: nn.Module, batch: int, length: int, seed: int) -> None:
        self.model, self.batch, self.seed = model, batch, seed
        self.config: Any = model.config
        positions = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        self.length = min(length, positions) if type(positions) is int and positions > 2 else length
        self.parts = [part for _, part in tree(self.config)]
        self.accepted = inspect.signature(model.forward).parameters
        first = next(p for p in model.parameters() if p.is_floating_point())
        self.device, self.dtype = first.device, first.dtype

    def options(self) -> list[Main]:
        """Sets of main inputs in the order of trial: one alone, text first; then two together."""
        main = getattr(self.model, "main_input_name", "input_ids")
        names = [n for n in ("input_ids", "pixel_values", "input_features", "input_values") if n in self.accepted]
        names += [main] if main in self.accepted and main not in names else []
        names.sort(key=lambda n: (n != "input_ids", n != main))
        singles: list[Main] = [((name, shape),) for name in names for shape in self.shapes(name)]
        pairs: list[Main] = [
            ((a, x), (b, y))
            for a, b in itertools.combinations(names, 2)
            for x in self.shapes(a)
            for y in self.shapes(b)
        ]
        return singles + pairs or [(("input_ids", ()),)]

    def shapes(self, name: str) -> list[tuple[int, ...]]:
        """The layouts that an input of this name comes in, the commonest first."""
        if name.startswith("pixel_values"):
            patches = [(16, c * self.number("patch_size", default=16) ** 2) for c, _, _ in self.images()]
            return [s for image in self.images() for s in (image, (self.frames(), *image))] + patches
        if name == "input_values":
            return [*((t,) for t in self.samples()), *((1, t) for t in self.samples()), *self.spectra()]
        if name in ("input_features", "past_values"):
            return self.spectra()
        return [()]

    def images(self) -> list[tuple[int, int, int]]:
        sized = [p for p in self.parts if getattr(p, "image_size", None) or getattr(p, "img_size", None)]
        found = []
        for part in sized or self.parts:
            size = getattr(part, "image_size", None) or getattr(part, "img_size", None) or 64
            height, width = (ints(size) * 2)[:2]
            channels = [c for n in ("num_channels", "in_channels", "in_chans") for c in ints(getattr(part, n, None))]
            found.append((channels[0] if channels else 3, height, width))
        return list(dict.fromkeys(found))

    def frames(self) -> int:
        return self.number("num_frames", "frames_per_clip", default=4)

    def samples(self) -> list[int]:
        """Lengths of a waveform: some frames after the strides of the convolutions."""
        strides = next((v for p in self.parts if (v := getattr(p, "conv_stride", None))), (5, 2, 2, 2, 2, 2, 2))
        return [math.prod(strides) * self.length + 80]

    def spectra(self) -> list[tuple[int, ...]]:
        """Frames by bins, bins by frames, and an image of them."""
        names = (
            "num_mel_bins",
            "n_mel_bins",
            "feature_projection_input_dim",
            "input_feat_per_channel",
            "input_dim",
            "feature_size",
            "num_input_channels",
            "input_size",
            "mel_dim",
            "input_channels",
        )
        bins = list(dict.fromkeys(v for n in names for p in self.parts for v in ints(getattr(p, n, None)))) or [80]
        whisper = [2 * v for p in self.parts for v in ints(getattr(p, "max_source_positions", None))]
        times = [
            v
            for n in ("max_length", "context_length", "spec_size")
            for p in self.parts
            for v in ints(getattr(p, n, None))
        ]
        times = list(dict.fromkeys([*times, *whisper, 8 * self.length]))
        return [s for b in bins for t in times for s in ((b, t), (t, b), (1, t, b))]

    def runs(self, option: Main) -> bool:
        inputs = self.make(option)
        if self.device.type == "meta":  # the masking code looks at the mask's values
            inputs.pop("attention_mask", None)
        try:
            with torch.no_grad():
                self.model(**inputs)
        except Exception:
            return False
        return True

    def make(self, option: Main) -> dict[str, Tensor]:
        self.generator = torch.Generator().manual_seed(self.seed)
        made = {name: self.normal(*shape) if shape else self.input_ids() for name, shape in option}
        for name in self.accepted:
            extra = None if name in made else self.extra(name, made)
            made |= {} if extra is None else {name: extra}
        return {name: self.place(value) for name, value in made.items()}

    def extra(self, name: str, made: dict[str, Tensor]) -> Tensor | None:
        """The further input of this name that goes with the main ones; None where it is best left out."""
        text = made.get("input_ids")
        match name:
            case "attention_mask":
                main = text if text is not None else made.get("input_values")
                return None if main is None or main.ndim != 2 else self.mask(main.shape[1])
            case "token_type_ids" if text is not None and self.number("type_vocab_size", default=0) > 1:
                return (torch.arange(self.length) >= self.length // 2).long().expand(self.batch, -1)
            case "decoder_input_ids":
                vocab = self.number("decoder_vocab_size", "tgt_vocab_size", "vocab_size", default=VOCAB)
                return self.ids(vocab, self.length - 2)
            case "spatial_shapes" | "pixel_attention_mask" if (pixels := made.get("pixel_values")) is not None:
                side = math.isqrt(pixels.shape[1])
                shape = torch.full((self.batch, 2), side) if name == "spatial_shapes" else torch.ones(pixels.shape[:2])
                return shape.long() if pixels.ndim == 3 else None
            case "bbox" if text is not None:
                corner = torch.randint(0, 400, (self.batch, self.length, 2), generator=self.generator)
                return torch.cat([corner, corner + 50], dim=-1)
        return None

    def place(self, value: Tensor) -> Tensor:
        return value.to(self.device, self.dtype if value.is_floating_point() else value.dtype)

    def number(self, *names: str, default: int) -> int:
        return next((v for n in names for p in self.parts for v in ints(getattr(p, n, None))), default)

    def ids(self, vocab: int, length: int) -> Tensor:
        """Ids over the whole vocabulary but for the special ones."""
        named = ((n, value) for part in self.parts for n, value in vars(part).items())
        special = {v for n, value in named if role_of(n) == "ids" for v in ints(value)}
        plain = torch.tensor([i for i in range(min(vocab, 100_000)) if i not in special] or [0])
        return plain[torch.randint(len(plain), (self.batch, length), generator=self.generator)]

    def normal(self, *shape: int) -> Tensor:
        return torch.randn(self.batch, *shape, generator=self.generator)

    def mask(self, length: int) -> Tensor:
        mask = torch.ones(self.batch, length, dtype=torch.long)
        mask[-1, -max(1, length // 4) :] = 0
        return mask

    def input_ids(self) -> Tensor:
        text = self.config.get_text_config()
        return self.ids(getattr(text, "vocab_size", None) or self.number("vocab_size", default=VOCAB), self.length)
