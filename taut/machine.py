"""What a device can do: peaks, bandwidths, capacities and the cost of a call, each figure with where it comes from."""

from __future__ import annotations

import ctypes
import json
import os
import platform
import shutil
import subprocess
import tempfile
import time
import tomllib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from hashlib import sha256
from importlib import resources
from pathlib import Path
from typing import Literal

import torch

from taut.huge_pages import collapse
from taut.op import Work
from taut.user_cache import user_cache
from taut.whole_file import write_text

DATA_SHEET, MEASURED = "data sheet", "measured"
Progress = Callable[[str], None]


@dataclass(frozen=True)
class Figure:
    """A number in SI units (FLOP/s, bytes/s, bytes, seconds), measured or from a data sheet."""

    value: float
    origin: str = DATA_SHEET
    source: str = ""


@dataclass(frozen=True)
class Machine:
    """A device. `peaks` is keyed by dtype (dense products); `bandwidths` and `capacities` by level (`memory`, ...)."""

    name: str
    kind: Literal["cpu", "gpu"]
    peaks: dict[str, Figure]
    bandwidths: dict[str, Figure]
    capacities: dict[str, Figure] = field(default_factory=dict)
    call: Figure | None = None

    def seconds(self, work: Work, dtype: torch.dtype | str) -> float:
        """The least time in which the machine can do the work: max(FLOPs / peak, bytes / memory bandwidth).

        Raises ValueError where no peak is known for the dtype.
        """
        return max(work.flops / self.peak(dtype), work.bytes / self.bandwidths["memory"].value)

    def slack(self, seconds: float, work: Work, dtype: torch.dtype | str) -> float:
        """Measured time over the least time; 1 is the physical limit, less means that a cache served it."""
        return seconds / self.seconds(work, dtype)

    def peak(self, dtype: torch.dtype | str) -> float:
        """FLOP/s in a dtype. Raises ValueError where none is known."""
        name = str(dtype).removeprefix("torch.")
        if name not in self.peaks:
            raise ValueError(f"{self.name} has no peak for {name}; known are {', '.join(self.peaks)}")
        return self.peaks[name].value


def here() -> list[str]:
    """The devices of this machine that `measure` knows: "cpu", and "cuda" where torch finds a GPU."""
    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def names() -> list[str]:
    """The machines that taut ships data sheets of."""
    folder = resources.files("taut") / "machines"
    return sorted(f.name.removesuffix(".toml") for f in folder.iterdir() if f.name.endswith(".toml"))


def load(name: str) -> Machine:
    """The machine of a name in `names()`. Raises ValueError for an unknown one."""
    if name not in names():
        raise ValueError(f"unknown machine {name!r}; known are {', '.join(names())}")
    sheet = tomllib.loads((resources.files("taut") / "machines" / f"{name}.toml").read_text())
    figures = lambda table: {key: Figure(float(value), source=sheet["source"]) for key, value in table.items()}  # noqa: E731
    levels = figures(sheet["bandwidths"]), figures(sheet.get("capacities", {}))
    return Machine(sheet["name"], sheet["kind"], figures(sheet["peaks"]), *levels)


def measured(device: str = "cpu") -> Machine | None:
    """What `measure` found on this CPU earlier, with as many threads, or on a GPU, and the same torch; else None."""
    try:
        return _from_json(cache_file(device).read_text())
    except (OSError, ValueError, KeyError, TypeError):
        return None


def choose(name: str | None) -> Machine | None:
    """The machine that a user names; for None, this one if it has been measured.

    `this`, or the CPU's own name, is this one, and `cuda` is its GPU. Raises BadInput for an unknown name, and for
    what has not been measured.
    """
    from taut.checkpoint import BadInput
    from taut.runtime.placed import gpu

    if name is None:
        return measured()
    on_gpu = name.split(":")[0] == "cuda"
    if on_gpu or name in ("this", cpu_name()):
        found = measured(str(gpu(name)) if on_gpu else "cpu")
        if found is None:
            raise BadInput("this machine has not been measured", "run `taut machines --measure` once")
        return found
    try:
        return load(name)
    except ValueError as error:
        raise BadInput(str(error), "name one of these, or `this` for the machine at hand") from error


def measure(progress: Progress | None = None, device: str = "cpu") -> Machine:
    """Measure this CPU with torch's current number of threads, or a GPU, and remember the result for `measured`.

    A CPU takes about half a minute, and memory of four times the last-level cache (at most a quarter of what is free).
    `progress` is told what is being measured. Measure on a quiet machine.
    """
    tell = progress or (lambda _: None)
    machine = _cpu(tell) if device == "cpu" else _gpu(device, tell)
    cache_file(device).parent.mkdir(parents=True, exist_ok=True)
    write_text(cache_file(device), json.dumps(asdict(machine), indent=1))
    return machine


def _cpu(tell: Progress) -> Machine:
    size = read_size()
    bandwidth = read_bandwidth(size, tell)
    peaks = dict(_peaks(tell))
    tell("cost of a call")
    capacities = {"memory": Figure(_memory_bytes()[0], MEASURED), "cache": Figure(last_level_cache(), MEASURED)}
    return Machine(cpu_name(), "cpu", peaks, {"memory": bandwidth}, capacities, _call_cost())


def _gpu(device: str, tell: Progress) -> Machine:
    from taut.measure_gpu import machine_of

    return machine_of(torch.device(device), tell)


def read_bandwidth(size: int, progress: Progress = lambda _: None, seconds: float = 1.0, device: str = "cpu") -> Figure:
    """The fastest read of `size` bytes seen: by torch.sum, by a kernel of ours and, on a CPU with a compiler, by C.

    `seconds` is how long each is tried.
    """
    if device != "cpu":
        from taut import measure_gpu

        return measure_gpu.read_bandwidth(torch.device(device), size, progress, seconds)
    values = torch.ones(size // 4)
    where = " on large pages" if collapse([values]) else ""
    readers: dict[str, Callable[[], object]] = {"torch.sum": values.sum, "numba": _numba_reader(values)}
    stream = _c_reader(values)
    if stream is not None:
        readers["C"] = stream
    best = dict[str, float]()
    for name, reader in readers.items():
        progress(f"read bandwidth by {name}")
        best[name] = values.nbytes / _fastest(reader, seconds)
    winner = max(best, key=lambda name: best[name])
    rates = ", ".join(f"{name} {rate / 1e9:.1f}" for name, rate in best.items())
    return Figure(best[winner], MEASURED, f"read of {values.nbytes / 2**20:.0f} MiB{where}, GB/s: {rates}")


def read_size(device: str = "cpu") -> int:
    """Bytes to read so that the caches do not help: four times the last level, but no more than memory allows."""
    if device != "cpu":
        from taut import measure_gpu

        return measure_gpu.read_size(torch.device(device))
    return int(min(max(4 * last_level_cache(), 256 * 2**20), _memory_bytes()[1] / 4))


def last_level_cache() -> int:
    """Bytes of the largest cache of this CPU; 32 MiB where the system does not tell."""
    sizes = []
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        sizes.append(int(text[:-1]) * {"K": 2**10, "M": 2**20, "G": 2**30}[text[-1]])
    return max(sizes, default=32 * 2**20)


def cpu_name() -> str:
    """The CPU's name as the system gives it."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    models = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return models[0] if models else platform.processor() or platform.machine()


def _fastest(run: Callable[[], object], seconds: float) -> float:
    run()
    best, stop = float("inf"), time.perf_counter() + seconds
    while True:
        start = time.perf_counter()
        run()
        end = time.perf_counter()
        best = min(best, end - start)
        if end > stop:
            return best


def _numba_reader(values: torch.Tensor) -> Callable[[], object]:
    from taut.ops._numba.read import read

    return lambda: read(values.data_ptr(), values.numel(), torch.get_num_threads())


SMALL = 128

STREAM = """
float taut_read(const float *x, long n, int threads) {
    float total = 0;
    #pragma omp parallel for simd num_threads(threads) reduction(+ : total) schedule(static)
    for (long i = 0; i < n; i++) total += x[i];
    return total;
}
"""


def _c_reader(values: torch.Tensor) -> Callable[[], object] | None:
    """The read loop of STREAM by the system's C compiler; None where there is none that can build it."""
    compiler = shutil.which("cc")
    if compiler is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder) / "read.c", Path(folder) / "read.so"
        source.write_text(STREAM)
        flags = ["-O3", "-march=native", "-ffast-math", "-fopenmp", "-shared", "-fPIC"]
        done = subprocess.run([compiler, *flags, str(source), "-o", str(library)], capture_output=True, check=False)
        if done.returncode:
            return None
        read = ctypes.CDLL(str(library)).taut_read
    read.argtypes, read.restype = [ctypes.c_void_p, ctypes.c_long, ctypes.c_int], ctypes.c_float
    return lambda: read(values.data_ptr(), values.numel(), torch.get_num_threads())


def _peaks(progress: Progress, side: int = 2048, seconds: float = 1.0) -> Iterator[tuple[str, Figure]]:
    """The rate of a square product in every dtype that torch multiplies on this CPU."""
    for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int8):
        name = str(dtype).removeprefix("torch.")
        progress(f"product rate in {name}")
        product = getattr(torch, "_int_mm") if dtype == torch.int8 else torch.mm  # noqa: B009
        rate, used = _product_rate(product, dtype, SMALL, seconds / 10), SMALL  # one call alone may wait for a thread
        if 2 * side**3 / rate < 2 * seconds:  # where a dtype is emulated, one large product takes minutes
            rate, used = _product_rate(product, dtype, side, seconds), side
        yield name, Figure(rate, MEASURED, f"{product.__name__}, {used} x {used} x {used}")


def _product_rate(product: Callable[..., object], dtype: torch.dtype, side: int, seconds: float) -> float:
    a, b = (torch.ones(side, side).to(dtype) for _ in range(2))
    return 2 * side**3 / _fastest(lambda: product(a, b), seconds)


def _call_cost() -> Figure:
    x = torch.ones(1)
    calls = 1000

    def run() -> None:
        for _ in range(calls):
            torch.add(x, x, out=x)

    return Figure(_fastest(run, 0.2) / calls, MEASURED, "torch.add of one element")


def _memory_bytes() -> tuple[int, int]:
    """(all, free) bytes of memory."""
    page = os.sysconf("SC_PAGE_SIZE")
    return page * os.sysconf("SC_PHYS_PAGES"), page * os.sysconf("SC_AVPHYS_PAGES")


def cache_file(device: str = "cpu") -> Path:
    """Where the measured figures of this CPU and this number of threads, or of a GPU, and of this torch lie."""
    if device == "cpu":
        what = f"{cpu_name()} {os.cpu_count()} {torch.get_num_threads()} {torch.__version__}"
    else:
        what = f"{torch.cuda.get_device_name(device)} {torch.__version__}"
    return user_cache("machines") / f"{sha256(what.encode()).hexdigest()[:16]}.json"


def _from_json(text: str) -> Machine:
    data = json.loads(text)
    figures = lambda table: {key: Figure(**value) for key, value in table.items()}  # noqa: E731
    levels = figures(data["bandwidths"]), figures(data["capacities"])
    return Machine(data["name"], data["kind"], figures(data["peaks"]), *levels, Figure(**data["call"]))
