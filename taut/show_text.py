"""What `taut generate` prints: the text as it comes, then one line that says what it took."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from typing import Any

from taut import generation
from taut.checkpoint import open_checkpoint
from taut.generation import Spent, Writer


class Text:
    """One text: `open` compiles the model, `write` prints. `interrupted` says that the user ended it."""

    def __init__(self, model: str, prompt: str, chat: bool, opening: dict[str, Any], drawing: dict[str, Any]) -> None:
        self.model, self.prompt, self.chat, self.opening, self.drawing = model, prompt, chat, opening, drawing
        self.interrupted = False
        self.spent = Spent()
        self.fallback: str | None = None
        self.pieces: Iterator[str] = iter(())
        self.writer: Writer | None = None

    def open(self, progress: Callable[[str], None]) -> None:
        """Raises BadInput; where only the step cannot be compiled, transformers is taken instead."""
        from taut.runtime.compiling import CannotCompile

        try:
            self.writer = generation.writer(self.model, progress=progress, **self.opening)
        except CannotCompile as error:
            self.fallback = str(error)
            self.pieces = self._with_transformers()
            return
        ids = generation.encode(self.writer.folder, self.writer.tokenizer, self.prompt, self.chat)
        self.pieces = self.writer.stream(ids, **self.drawing)
        self.spent = self.writer.spent

    def _with_transformers(self) -> Iterator[str]:
        asked = {name: self.opening[name] for name in ("revision", "trust_remote_code")}
        kept = {name: self.opening[name] for name in ("device", "weights", "max_length")}
        checkpoint = open_checkpoint(self.model, **asked)
        tokenizer = generation.tokenizer_of(checkpoint.path)
        ids = generation.encode(checkpoint.path, tokenizer, self.prompt, self.chat)
        return generation.with_transformers(checkpoint, ids, tokenizer, spent=self.spent, **kept, **self.drawing)

    def write(self, as_json: bool) -> None:
        if self.fallback:
            print(f"taut cannot compile this model, so transformers generates: {self.fallback}", file=sys.stderr)
        said = []
        try:
            for piece in self.pieces:
                said.append(piece)
                if not as_json:
                    print(piece, end="", flush=True)
        except KeyboardInterrupt:
            self.interrupted = True
            self.spent.ended = "interrupted"
        self._measure()
        if as_json:
            record = {"text": "".join(said), "prompt": self.prompt, "fallback": self.fallback}
            print(json.dumps(record | self.spent.as_dict()))
        else:
            print(f"\n{self.spent}", flush=True)

    def _measure(self) -> None:
        from taut import machine

        here = machine.measured(self.opening["device"])
        if here is not None and self.spent.bytes and self.spent.seconds:
            self.spent.slack = self.spent.seconds * here.bandwidths["memory"].value / self.spent.bytes
