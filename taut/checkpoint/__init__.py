"""Checkpoints on disk: opened, checked, streamed and written back."""

from taut.checkpoint.edits import Copy, Edit, Fill, Scale
from taut.checkpoint.errors import BadInput, OutOfRange
from taut.checkpoint.read import Checkpoint, open_checkpoint
from taut.checkpoint.rounding import round_once
from taut.checkpoint.shards import TensorInfo
from taut.checkpoint.stream import Mismatch
from taut.checkpoint.write import write_checkpoint, write_taut

__all__ = [
    "BadInput",
    "Checkpoint",
    "Copy",
    "Edit",
    "Fill",
    "Mismatch",
    "OutOfRange",
    "Scale",
    "TensorInfo",
    "open_checkpoint",
    "round_once",
    "write_checkpoint",
    "write_taut",
]
