"""What a checkpoint may be refused for: a cause and a cure, told apart from faults of taut's own."""

from __future__ import annotations

from collections.abc import Mapping


class BadInput(Exception):
    """The input cannot be used. The message is the cause, `cure` says what to do about it."""

    def __init__(self, cause: str, cure: str) -> None:
        super().__init__(cause)
        self.cure = cure


class OutOfRange(BadInput):
    """Edited values leave their dtype's normal range; `tensors` says for each tensor how many, and how."""

    def __init__(self, tensors: Mapping[str, str]) -> None:
        named = "; ".join(f"{name}: {what}" for name, what in sorted(tensors.items()))
        super().__init__(
            f"values outside the dtype's normal range: {named}", "leave these sites out, or use a wider dtype"
        )
        self.tensors = dict(tensors)
