"""What each norm of a model costs and why: which are free, which can be made free and by what, which never.

Source: the report per norm of Luo et al., Enjoy Your Layer Normalization with the Computational Efficiency of RMSNorm,
2026, arXiv:2605.14521 (foldable norms); what makes a norm free: Graef et al., FlashNorm, 2024, arXiv:2407.09577.
Differs: a norm has three parts, each judged by the rewrite that removes it, and the reason is that rewrite's own.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from torch import fx

from taut.graph import Graph, shape
from taut.lift._match import is_call
from taut.ops.dyt import dyt
from taut.ops.layer_norm import layer_norm
from taut.ops.rms_norm import rms_norm
from taut.rewrite import Form, Rewrite, Site, rewrites
