"""How every kernel here is started."""

from __future__ import annotations

import triton


def interpreted() -> bool:
    """Whether Triton runs the kernels on the CPU, one operation after the other."""
    return bool(triton.knobs.runtime.interpret)


def options(warps: int = 4, stages: int = 1, pdl: bool = True) -> dict[str, int | bool]:
    """What a launch takes beside its arguments; with `pdl` it may start while the kernel before it ends."""
    chosen: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return chosen | {"launch_pdl": True} if pdl else chosen
