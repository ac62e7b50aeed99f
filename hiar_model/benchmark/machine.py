"""The machine of a measurement: its name, its driver, its clocks while the work ran."""

from __future__ import annotations

import ctypes
import platform
import re
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from statistics import median
from typing import Any

import torch

from ..version import versions

CPUINFO = "/proc/cpuinfo"
EVERY = 0.2  # seconds between two samples
_NVML = "libnvidia-ml.so.1"  # comes with the driver
_SM, _POWER_MW, _CELSIUS = 1, 1000.0, 0  # NVML's names of a clock and a sensor


def describe(device: torch.device) -> dict[str, Any]:
    """Device, driver and processor, as JSON values."""
    cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if cuda else processor(),
        "kind": device.type,
        "driver": _driver() if cuda else None,
        "memory_bytes": torch.cuda.get_device_properties(device).total_memory if cuda else None,
        "processor": processor(),
        "system": f"{platform.system()} {platform.machine()}",
        "threads": torch.get_num_threads(),
    }


def describe_versions() -> dict[str, str]:
    """Versions of all that a figure may depend on; "absent" for what is not installed."""
    installed = versions("torch", "triton", "numpy", "diffusers", "flash-attn")
    cudnn = torch.backends.cudnn.version() if torch.cuda.is_available() else None
    return {**installed, "cuda": torch.version.cuda or "absent", "cudnn": "absent" if cudnn is None else str(cudnn)}


def processor() -> str:
    """The name of the CPU."""
    try:
        match = re.search(r"^model name\s*: (.*)$", Path(CPUINFO).read_text(), re.M)
    except OSError:
        match = None
    return " ".join(match[1].split()) if match else platform.processor() or platform.machine()


def host_peak_bytes() -> int | None:
    """The largest resident memory that this process has had, libraries included; None where the system does not say."""
    try:
        import resource
    except ImportError:  # Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak * (1 if sys.platform == "darwin" else 1024)


class Clocks:
    """Samples the clocks of a device in a thread of its own.

    On CUDA by NVML, which comes with the driver; on a CPU by /proc/cpuinfo. Where neither answers, nothing is sampled
    and :meth:`summary` says why.

    Example:
        >>> clocks = Clocks(torch.device("cpu"))
        >>> with clocks.sampling():
        ...     _ = torch.randn(8, 8).sum()
        >>> sorted(set(clocks.summary()) & {"source", "absent"}) != []
        True
    """

    def __init__(self, device: torch.device, every: float = EVERY) -> None:
        self.every = every
        self.samples: list[dict[str, float]] = []
        self.absent, self.source = "", ""
        self._read: Callable[[], dict[str, float]] | None = None
        try:
            self.source, self._read = _nvml(device) if device.type == "cuda" else _proc()
            self._read()
        except (OSError, ValueError, AttributeError) as error:
            self._read, self.absent = None, f"not sampled: {error}"

    @contextmanager
    def sampling(self) -> Iterator[None]:
        """Sample as long as the context lasts, at least at its start and its end."""
        read = self._read
        if read is None:
            yield
            return
        stop = threading.Event()

        def run() -> None:
            while True:
                with suppress(OSError, ValueError):  # one sample less
                    self.samples.append(read())
                if stop.wait(self.every):
                    return

        thread = threading.Thread(target=run, name="clocks", daemon=True)
        thread.start()
        try:
            yield
        finally:
            stop.set()
            thread.join()

    def summary(self) -> dict[str, Any]:
        """{"source", "every_s", "samples", and for each quantity {"min", "median", "max"}}, or {"absent": why}."""
        if not self.samples:
            return {"absent": self.absent or "not sampled: nothing ran"}
        result: dict[str, Any] = {"source": self.source, "every_s": self.every, "samples": len(self.samples)}
        for name in self.samples[0]:
            values = [sample[name] for sample in self.samples if name in sample]
            result[name] = {"min": min(values), "median": median(values), "max": max(values)}
        return result


def _proc() -> tuple[str, Callable[[], dict[str, float]]]:
    """MHz of the cores as Linux says it: the mean of all."""

    def read() -> dict[str, float]:
        clocks = [float(mhz) for mhz in re.findall(r"^cpu MHz\s*: ([\d.]+)$", Path(CPUINFO).read_text(), re.M)]
        if not clocks:
            raise ValueError(f"{CPUINFO} says no MHz")
        return {"mhz": sum(clocks) / len(clocks)}

    return f"{CPUINFO}, mean of the cores", read


def _library() -> Any:
    nvml = ctypes.CDLL(_NVML)
    _check(nvml.nvmlInit_v2())
    return nvml


def _check(status: int) -> None:
    if status:
        raise ValueError(f"NVML error {status}")


def _nvml(device: torch.device) -> tuple[str, Callable[[], dict[str, float]]]:
    """MHz of the multiprocessors, watts and degrees Celsius of a CUDA device."""
    nvml, handle = _library(), ctypes.c_void_p()
    uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}"  # its number may be another one for torch
    _check(nvml.nvmlDeviceGetHandleByUUID(uuid.encode(), ctypes.byref(handle)))

    def read() -> dict[str, float]:
        value = ctypes.c_uint()
        _check(nvml.nvmlDeviceGetClockInfo(handle, _SM, ctypes.byref(value)))
        sample = {"mhz": float(value.value)}
        if not nvml.nvmlDeviceGetPowerUsage(handle, ctypes.byref(value)):  # not every card measures it
            sample["watts"] = value.value / _POWER_MW
        if not nvml.nvmlDeviceGetTemperature(handle, _CELSIUS, ctypes.byref(value)):
            sample["celsius"] = float(value.value)
        return sample

    return "NVML, multiprocessors", read


def _driver() -> str | None:
    """The version of the NVIDIA driver; None: NVML does not say."""
    try:
        text = ctypes.create_string_buffer(96)
        _check(_library().nvmlSystemGetDriverVersion(text, 96))
    except (OSError, ValueError, AttributeError):
        return None
    return text.value.decode()
