"""Gather facts about the machine, as far as this process may use it: CPU, memory, GPUs and
compilers."""

from __future__ import annotations

import functools
import os
import platform
import shutil
from dataclasses import dataclass
from pathlib import Path

from dovetail.facts.cgroups import PROC, read_limits
from dovetail.facts.gpus import GpuFacts, find_gpus


@dataclass(frozen=True)
class DeviceFacts:
    """The machine, as far as this process may use it, read once from the operating system without a
    tensor library."""

    system: str
    machine: str
    num_cores: int
    """Number of cores that this process may use at once; see `usable_cores`."""
    memory_bytes: int
    """Size of the main memory, or the limit of a control group (a container) if that is lower."""
    cpu_flags: frozenset[str]
    compiler: str | None
    """Path of the C++ compiler."""
    nvcc: str | None = None
    """Path of the CUDA compiler."""
    gpus: tuple[GpuFacts, ...] = ()
    """NVIDIA GPUs; `cuda:i` is `gpus[i]`."""
    gpu_trouble: str = ""
    """Reason why fewer GPUs may be listed than the machine has."""

    @property
    def num_gpus(self) -> int:
        return len(self.gpus)

    @property
    def devices(self) -> list[str]:
        return [*(f"cuda:{i}" for i in range(self.num_gpus)), "cpu"]


@functools.cache
def device_facts() -> DeviceFacts:
    flags: frozenset[str] = frozenset()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as f:
            flags = next(
                (
                    frozenset(line.split(":")[1].split())
                    for line in f
                    if line.startswith(("flags", "Features"))
                ),
                flags,
            )
    except OSError:
        pass
    gpus, gpu_trouble = find_gpus()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limits = read_limits()
    return DeviceFacts(
        system=platform.system(),
        machine=platform.machine(),
        num_cores=usable_cores(limits.num_cpus),
        memory_bytes=memory if limits.memory_bytes is None else min(memory, limits.memory_bytes),
        cpu_flags=flags,
        compiler=shutil.which(os.environ.get("CXX", "g++")) or shutil.which("c++"),
        nvcc=_nvcc(),
        gpus=gpus,
        gpu_trouble=gpu_trouble,
    )


def usable_cores(num_cpus: float | None) -> int:
    """Return the number of cores in this process' affinity mask, or `num_cpus` (CPU time granted by
    a control group) if that is lower; at least 1.

    `num_cpus` is rounded down: a team of threads that uses more CPU time than granted is stopped as
    a whole for the rest of each period (usually 100 ms), which delays every next token. The
    remainder is left for the front-end process.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if num_cpus is None else max(1, min(cores, int(num_cpus)))


def available_memory(proc: Path = PROC, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Return the bytes of main memory that are available now without swapping, within the limits of
    control groups; None if unknown.

    `proc` is this process' folder in /proc.
    """
    available = read_limits(proc).available_bytes
    try:
        with open(meminfo, encoding="ascii") as f:
            free = next(
                (int(line.split()[1]) * 1024 for line in f if line.startswith("MemAvailable")), None
            )
    except OSError:
        free = None
    return min((n for n in (available, free) if n is not None), default=None)


def _nvcc() -> str | None:
    """Return the nvcc of CUDA_HOME, else that of PATH, else that of the usual location."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if (found := shutil.which(place))), None)
