"""The clocks that hiar bench samples while rollouts run, and what it says where there are none."""

from __future__ import annotations

import ctypes
import types

import pytest
import torch

from hiar_model.benchmark import machine, result

pytestmark = pytest.mark.cpu


def test_clocks_of_a_cpu(tmp_path, monkeypatch):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: A  Chip\ncpu MHz\t\t: 1000.0\n\nmodel name\t: A Chip\ncpu MHz\t\t: 3000.0\n")
    monkeypatch.setattr(machine, "CPUINFO", str(cpuinfo))
    clocks = machine.Clocks(torch.device("cpu"), every=10)
    with clocks.sampling():
        pass
    about = clocks.summary()
    assert about["mhz"] == {"min": 2000.0, "median": 2000.0, "max": 2000.0} and about["samples"] == 1
    assert machine.processor() == "A Chip"
    assert result.clocks(about).startswith("2000 [2000, 2000] MHz: median [least, most] of 1 samples (")


@pytest.mark.parametrize("content", [None, "model name : arm\n"])
def test_without_clocks_it_says_so(tmp_path, monkeypatch, content):
    cpuinfo = tmp_path / "cpuinfo"
    if content is not None:
        cpuinfo.write_text(content)
    monkeypatch.setattr(machine, "CPUINFO", str(cpuinfo))
    clocks = machine.Clocks(torch.device("cpu"))
    with clocks.sampling():
        pass
    assert clocks.summary()["absent"].startswith("not sampled: ")


class FakeNVML:
    """The calls of NVML that are used; `power`: its status."""

    def __init__(self, status: int = 0, power: int = 0) -> None:
        self.status, self.power, self.uuid = status, power, b""

    def nvmlInit_v2(self):
        return self.status

    def nvmlDeviceGetHandleByUUID(self, uuid, handle):
        self.uuid = uuid
        return 0

    def nvmlDeviceGetClockInfo(self, handle, kind, value):
        assert kind == 1
        return put(value, 1980)

    def nvmlDeviceGetPowerUsage(self, handle, value):
        return self.power or put(value, 650_000)

    def nvmlDeviceGetTemperature(self, handle, sensor, value):
        return put(value, 61)

    def nvmlSystemGetDriverVersion(self, text, length):
        text.value = b"575.1"
        return 0


def put(reference, number: int) -> int:
    ctypes.cast(reference, ctypes.POINTER(ctypes.c_uint))[0] = number
    return 0


@pytest.mark.parametrize("power", [0, 3])
def test_clocks_of_a_gpu(monkeypatch, power):
    nvml = FakeNVML(power=power)
    monkeypatch.setattr(ctypes, "CDLL", lambda name: nvml)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(uuid="ab-cd"))
    clocks = machine.Clocks(torch.device("cuda"), every=10)
    with clocks.sampling():
        pass
    about = clocks.summary()
    assert nvml.uuid == b"GPU-ab-cd" and about["mhz"]["median"] == 1980 and about["celsius"]["max"] == 61
    assert about.get("watts") == (None if power else {"min": 650.0, "median": 650.0, "max": 650.0})
    assert machine._driver() == "575.1"


def test_a_gpu_without_nvml(monkeypatch):
    for library in (FakeNVML(status=9), None):

        def load(name, library=library):
            if library is None:
                raise OSError("no such library")
            return library

        monkeypatch.setattr(ctypes, "CDLL", load)
        clocks = machine.Clocks(torch.device("cuda"))
        with clocks.sampling():
            pass
        why = "not sampled: NVML error 9" if library else "not sampled: no such library"
        assert clocks.summary() == {"absent": why} and machine._driver() is None


def test_the_machine_with_a_gpu(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: FakeNVML())
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "a GPU")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: types.SimpleNamespace(total_memory=7))
    about = machine.describe(torch.device("cuda"))
    assert (about["device"], about["kind"], about["driver"], about["memory_bytes"]) == ("a GPU", "cuda", "575.1", 7)
    assert about["processor"] == machine.processor() and machine.describe(torch.device("cpu"))["driver"] is None
