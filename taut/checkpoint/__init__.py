"""Checkpoints on disk: opened, checked, streamed and written back."""

from taut.checkpoint.changes import Change, disk_edits
from taut.checkpoint.edits import Copy, Edit, Fill, Scale
from taut.checkpoint.errors import BadInput, OutOfRange
from taut.checkpoint.names import Located, locate
from taut.checkpoint.probe import Piece
from taut.checkpoint.read import Checkpoint, open_checkpoint
from taut.checkpoint.rounding import round_once
from taut.checkpoint.shards import TensorInfo
from taut.checkpoint.stream import Mismatch
from taut.checkpoint.write import write_checkpoint, write_taut

__all__ = [
    "BadInput",
    "Change",
    "Checkpoint",
    "Copy",
    "Edit",
    "Fill",
    "Located",
    "Mismatch",
    "OutOfRange",
    "Piece",
    "Scale",
    "TensorInfo",
    "disk_edits",
    "locate",
    "open_checkpoint",
    "round_once",
    "write_checkpoint",
    "write_taut",
]
