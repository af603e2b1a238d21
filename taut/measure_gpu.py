"""Measure a GPU: how fast it reads and multiplies, and what a call costs. Times are by the device's own clock."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator

import torch

from taut.machine import MEASURED, Figure, Machine, Progress

CALLS = 10
"""So many calls are timed together: what starts the first is then hidden."""


def machine_of(device: torch.device, tell: Progress) -> Machine:
    """The GPU as a machine; takes some seconds, and 2 GiB of its memory."""
    found = torch.cuda.get_device_properties(device)
    bandwidth = read_bandwidth(device, read_size(device), tell, seconds=0.5)
    peaks = dict(_peaks(device, tell))
    tell("cost of a call")
    capacities = {"memory": Figure(found.total_memory, MEASURED), "cache": Figure(found.L2_cache_size, MEASURED)}
    return Machine(found.name, "gpu", peaks, {"memory": bandwidth}, capacities, _call_cost(device))


def read_size(device: torch.device) -> int:
    """Bytes to read so that the caches do not help: 2 GiB, but no more than half of what is free."""
    return min(2 * 2**30, torch.cuda.mem_get_info(device)[0] // 2)


def read_bandwidth(device: torch.device, size: int, tell: Progress, seconds: float) -> Figure:
    """The fastest read of `size` bytes seen, by torch.sum and by a kernel of ours."""
    values = torch.ones(size // 4, device=device)
    found = torch.empty(8 * torch.cuda.get_device_properties(device).multi_processor_count, device=device)
    best = dict[str, float]()
    for name, reader in {"torch.sum": values.sum, "Triton": _kernel(values, found)}.items():
        tell(f"read bandwidth by {name}")
        best[name] = values.nbytes / fastest(device, reader, seconds)
    winner = max(best, key=lambda name: best[name])
    rates = ", ".join(f"{name} {rate / 1e9:.0f}" for name, rate in best.items())
    return Figure(best[winner], MEASURED, f"read of {values.nbytes / 2**20:.0f} MiB, GB/s: {rates}")


def _kernel(values: torch.Tensor, found: torch.Tensor) -> Callable[[], object]:
    from taut.ops._triton.read import read

    return lambda: read(values, found)


def fastest(device: torch.device, run: Callable[[], object], seconds: float, calls: int = CALLS) -> float:
    """Seconds of a call: the least mean of some calls in a row that was seen."""
    with torch.cuda.device(device):
        run()
        best, stop = float("inf"), time.perf_counter() + seconds
        while True:
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(calls):
                run()
            end.record()
            end.synchronize()
            best = min(best, start.elapsed_time(end) / 1e3 / calls)
            if time.perf_counter() > stop:
                return best


def _peaks(
    device: torch.device, tell: Progress, side: int = 8192, seconds: float = 0.3
) -> Iterator[tuple[str, Figure]]:
    """The rate of a square product, of random numbers, in every dtype that torch multiplies on this GPU."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        tell(f"product rate in {name}")
        product = getattr(torch, "_int_mm") if dtype == torch.int8 else torch.mm  # noqa: B009
        a, b = (_random(dtype, side, device) for _ in range(2))
        used = fastest(device, lambda product=product, a=a, b=b: product(a, b.T), seconds, calls=2)
        yield name, Figure(2 * side**3 / used, MEASURED, f"{product.__name__}, {side} x {side} x {side}")


def _random(dtype: torch.dtype, side: int, device: torch.device) -> torch.Tensor:
    if dtype == torch.int8:
        return torch.randint(-127, 128, (side, side), dtype=dtype, device=device)
    return torch.randn(side, side, device=device, dtype=dtype)


def _call_cost(device: torch.device) -> Figure:
    x = torch.ones(1, device=device)
    return Figure(fastest(device, lambda: torch.add(x, x, out=x), 0.2, 1000), MEASURED, "torch.add of one element")
