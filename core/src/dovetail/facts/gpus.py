"""What NVML says of the GPUs, read once and without a tensor library; no GPU is touched by it."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any


@dataclass(frozen=True)
class GpuFacts:
    """One GPU that processes started from here can use."""

    name: str
    capability: tuple[int, int]
    """Compute capability: (9, 0) is Hopper."""
    memory_bytes: int
    cuda: tuple[int, int]
    """The newest CUDA version that its driver runs."""

    @property
    def architecture(self) -> str:
        return f"sm_{self.capability[0]}{self.capability[1]}"


def find_gpus(
    environ: Mapping[str, str] = os.environ, nvml: Any = None
) -> tuple[tuple[GpuFacts, ...], str]:
    """The GPUs in CUDA's order under CUDA_DEVICE_ORDER=PCI_BUS_ID, those that CUDA_VISIBLE_DEVICES
    leaves; and why there may be fewer than the machine has ("" if there is nothing to say). `nvml`
    is the module `pynvml`, or one like it."""
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
    """Indices of the GPUs that a CUDA_VISIBLE_DEVICES leaves, as CUDA reads it: up to the first
    entry that names none."""
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
    """There is nothing of NVIDIA's here, which is no trouble."""
    return error.value in (nvml.NVML_ERROR_LIBRARY_NOT_FOUND, nvml.NVML_ERROR_DRIVER_NOT_LOADED)


def _facts(nvml: Any, handle: Any, cuda: tuple[int, int]) -> GpuFacts:
    major, minor = nvml.nvmlDeviceGetCudaComputeCapability(handle)
    name = nvml.nvmlDeviceGetName(handle)
    memory = nvml.nvmlDeviceGetMemoryInfo(handle).total
    return GpuFacts(
        name.decode() if isinstance(name, bytes) else name, (major, minor), memory, cuda
    )
