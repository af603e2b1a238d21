"""How every kernel here is started."""

from __future__ import annotations

import triton


def interpreted() -> bool:
    """Whether Triton runs the kernels on the CPU, one operation after the other."""
    return bool(triton.knobs.runtime.interpret)


def early(tokens: int) -> bool:
    """Whether a kernel beside a product of so many tokens should start before the one before it has ended.

    For more tokens that one is the vendor's, which allows no such start: asking for it costs 0.4 us.
    """
    return tokens <= 64 and not interpreted()


def options(warps: int = 4, stages: int = 1, pdl: bool = True) -> dict[str, int | bool]:
    """What a launch takes beside its arguments; with `pdl` it may start while the kernel before it ends."""
    chosen: dict[str, int | bool] = {"num_warps": warps, "num_stages": stages}
    return chosen | {"launch_pdl": True} if pdl else chosen
