from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from types import SimpleNamespace

import pytest
import torch

from taut import machine, measure_gpu
from taut.checkpoint import BadInput
from taut.machine import DATA_SHEET, MEASURED, Figure, Machine
from taut.op import Work


@pytest.mark.parametrize("name", machine.names())
def test_shipped_machines_are_whole_and_name_their_source(name: str):
    m = machine.load(name)
    figures = [*m.peaks.values(), *m.bandwidths.values(), *m.capacities.values()]
    assert all(f.value > 0 and f.origin == DATA_SHEET and "https://" in f.source for f in figures)
    assert 1e10 < m.bandwidths["memory"].value < 2e13
    assert m.peaks["float32"].value < 1e15
    assert m.kind in ("cpu", "gpu")


def test_a_dozen_machines_are_shipped():
    kinds = [machine.load(name).kind for name in machine.names()]
    assert len(kinds) >= 12
    assert {"cpu", "gpu"} == set(kinds)


def test_seconds_is_the_roofline():
    m = Machine("m", "cpu", {"float32": Figure(100.0), "bfloat16": Figure(200.0)}, {"memory": Figure(10.0)})
    assert m.seconds(Work(1000, 10), "float32") == 10
    assert m.seconds(Work(1000, 10), torch.bfloat16) == 5
    assert m.seconds(Work(10, 100), torch.float32) == 10
    assert m.slack(25, Work(10, 100), torch.float32) == 2.5
    with pytest.raises(ValueError, match="no peak for int8; known are float32, bfloat16"):
        m.seconds(Work(1, 1), torch.int8)


def test_an_unknown_machine_is_refused_with_the_known_ones():
    with pytest.raises(ValueError, match="h200-sxm"):
        machine.load("abacus")


def test_measuring_this_cpu_is_remembered(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(machine, "read_size", lambda: 2**22)
    monkeypatch.setattr(machine, "_peaks", lambda tell: [("float32", Figure(1.0, MEASURED))])
    assert machine.measured() is None
    told: list[str] = []
    m = machine.measure(told.append)
    assert machine.measured() == m
    assert "read bandwidth by numba" in told
    assert m.call is not None
    assert all(f.origin == MEASURED for f in (m.bandwidths["memory"], m.capacities["cache"], m.call))
    assert 1e-8 < m.call.value < 1e-3
    assert "torch.sum" in m.bandwidths["memory"].source


def test_readers_read_everything():
    values = torch.rand(100_003)
    for reader in filter(None, (machine._numba_reader(values), machine._c_reader(values))):
        assert reader() == pytest.approx(values.double().sum().item(), rel=1e-4)


def test_product_rates_are_measured_in_every_dtype():
    peaks = dict(machine._peaks(lambda _: None, side=64, seconds=0.0))
    assert set(peaks) == {"float64", "float32", "bfloat16", "float16", "int8"}
    assert all(dataclasses.asdict(f)["origin"] == MEASURED and f.value > 1e6 for f in peaks.values())


class Clock:
    """An event of a GPU that is the CPU."""

    def __init__(self, enable_timing: bool) -> None:
        assert enable_timing

    def record(self) -> None:
        self.at = time.perf_counter()

    def synchronize(self) -> None:
        pass

    def elapsed_time(self, other: Clock) -> float:
        return 1e3 * (other.at - self.at)


@pytest.fixture
def pretended(monkeypatch, tmp_path):
    """A GPU that is the CPU."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    what = SimpleNamespace(name="pretended", total_memory=2**30, L2_cache_size=2**20, multi_processor_count=2)
    monkeypatch.setattr(torch.cuda, "Event", Clock)
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: what)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: what.name)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (2**22, 2**30))
    monkeypatch.setattr(measure_gpu, "_kernel", lambda values, found: values.sum)


def test_a_gpu_is_measured_by_its_own_clock_and_remembered(monkeypatch, pretended):
    rates = lambda device, tell: [("bfloat16", Figure(1.0, MEASURED))]  # noqa: E731
    monkeypatch.setattr(measure_gpu, "_peaks", rates)
    monkeypatch.setattr(machine, "_gpu", lambda device, tell: measure_gpu.machine_of(torch.device("cpu"), tell))
    told: list[str] = []
    assert machine.measured("cuda") is None
    m = machine.measure(told.append, "cuda")
    assert machine.measured("cuda") == m
    assert machine.measured() is None
    assert (m.name, m.kind, m.capacities["memory"].value) == ("pretended", "gpu", 2**30)
    assert "read bandwidth by Triton" in told
    assert "read of 2 MiB" in m.bandwidths["memory"].source
    assert m.call is not None
    assert 1e-8 < m.call.value < 1e-3
    assert 1e8 < m.bandwidths["memory"].value < 1e13


def test_product_rates_of_a_gpu(pretended):
    peaks = dict(measure_gpu._peaks(torch.device("cpu"), lambda _: None, side=64, seconds=0.0))
    assert set(peaks) == {"float64", "float32", "bfloat16", "float16", "int8"}
    assert all(f.value > 1e6 for f in peaks.values())


@pytest.mark.gpu
def test_a_real_gpu_is_measured(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    m = machine.measure(device="cuda")
    assert machine.choose("cuda") == m
    sheet = machine.load("h200-sxm")
    if "H200" in m.name:
        assert 0.7 < m.bandwidths["memory"].value / sheet.bandwidths["memory"].value < 1
        assert 0.4 < m.peaks["bfloat16"].value / sheet.peaks["bfloat16"].value < 1.05
    assert 1e-7 < m.call.value < 1e-4  # type: ignore[union-attr]


def test_a_machine_without_a_gpu_is_told_so(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.here() == ["cpu"]
    with pytest.raises(BadInput, match="no GPU"):
        machine.choose("cuda")


def test_choosing_a_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.choose(None) is None
    assert machine.choose("h200-sxm") == machine.load("h200-sxm")
    with pytest.raises(BadInput, match="has not been measured") as refused:
        machine.choose("this")
    assert "--measure" in refused.value.cure
    with pytest.raises(BadInput, match="unknown machine 'abacus'"):
        machine.choose("abacus")
    here = Machine("c", "cpu", {"float32": Figure(1.0)}, {"memory": Figure(2.0)}, {}, Figure(3.0))
    machine.cache_file().parent.mkdir(parents=True)
    machine.cache_file().write_text(json.dumps(dataclasses.asdict(here)))
    assert machine.choose(None) == machine.choose("this") == machine.choose(machine.cpu_name()) == here
    machine.cache_file().write_text("{")
    assert machine.choose(None) is None
