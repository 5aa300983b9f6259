"""Gather facts about GPUs from NVML, without a tensor library and without initializing a GPU."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class GpuFacts:
    """A GPU that processes started from this one can use."""

    name: str
    capability: tuple[int, int]
    """Compute capability; (9, 0) is Hopper."""
    memory_bytes: int
    cuda: tuple[int, int]
    """Newest CUDA version that the driver supports."""

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


def find_gpus(
    environ: Mapping[str, str] = os.environ, nvml: Any = None
) -> tuple[tuple[GpuFacts, ...], str]:
    """Return the GPUs that CUDA_VISIBLE_DEVICES leaves, in CUDA's order under
    CUDA_DEVICE_ORDER=PCI_BUS_ID, and the reason why fewer may be listed than the machine has (or an
    empty string). `nvml` is the module `pynvml` or a replacement."""
    nvml = import_module("pynvml") if nvml is None else nvml
    try:
        nvml.nvmlInit()
    except nvml.NVMLError as e:
        return (), (
            ""
            if _is_no_driver(nvml, e)
            else f"NVML, NVIDIA's management library, cannot be used: {e}"
        )
    try:
        version = nvml.nvmlSystemGetCudaDriverVersion_v2()
        handles = [nvml.nvmlDeviceGetHandleByIndex(i) for i in range(nvml.nvmlDeviceGetCount())]
        found = [
            _facts(nvml, handle, (version // 1000, version % 1000 // 10)) for handle in handles
        ]
        uuids = [str(nvml.nvmlDeviceGetUUID(handle)) for handle in handles]
        wanted = environ.get("CUDA_VISIBLE_DEVICES")
        if wanted is None:
            return tuple(found), ""
        seen = tuple(found[i] for i in visible(wanted, uuids))
        return seen, f"CUDA_VISIBLE_DEVICES is {wanted!r}" if len(seen) < len(found) else ""
    except nvml.NVMLError as e:
        return (), f"NVML, NVIDIA's management library, failed: {e}"
    finally:
        nvml.nvmlShutdown()


def visible(wanted: str, uuids: Sequence[str]) -> list[int]:
    """Return the indices of the GPUs that CUDA_VISIBLE_DEVICES leaves. Like CUDA, stop at the first
    invalid entry."""
    indices: list[int] = []
    for entry in wanted.split(","):
        name = entry.strip()
        matches = [
            i for i, uuid in enumerate(uuids) if name.startswith("GPU-") and uuid.startswith(name)
        ]
        if name.isdecimal() and int(name) < len(uuids):
            matches = [int(name)]
        if len(matches) != 1 or matches[0] in indices:
            break
        indices += matches
    return indices


def _is_no_driver(nvml: Any, error: Any) -> bool:
    """Return whether the error only means that no NVIDIA driver is installed."""
    return error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)


def _facts(nvml: Any, handle: Any, cuda: tuple[int, int]) -> GpuFacts:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return GpuFacts(
        name.decode() if isinstance(name, bytes) else name, (major, minor), memory, cuda
    )
