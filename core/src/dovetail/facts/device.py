"""The machine, as far as this process may use it: CPU, memory, GPUs and compilers, without a tensor
library."""

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
    """The machine, as far as this process may use it, read once from the operating system. No
    tensor library takes part."""

    system: str
    machine: str
    num_cores: int
    """Cores that this process may run on at once: see `usable_cores`."""
    memory_bytes: int
    """The main memory, or what a control group (a container) allows of it."""
    cpu_flags: frozenset[str]
    compiler: str | None
    """Path of a C++ compiler."""
    nvcc: str | None = None
    """Path of CUDA's compiler."""
    gpus: tuple[GpuFacts, ...] = ()
    """NVIDIA's; `cuda:i` is `gpus[i]`."""
    gpu_trouble: str = ""
    """Why there may be fewer of them than the machine has."""

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
    """Cores of this process' affinity, or of `num_cpus` (CPU time that a control group grants) if
    that is less; at least 1.

    Rounded down: a team of threads that takes more than is granted is stopped as a whole, for the
    rest of each period (100 ms as a rule), and everybody's next token waits. What is left over is
    for the front-end's process.
    """
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return cores if num_cpus is None else max(1, min(cores, int(num_cpus)))


def available_memory(proc: Path = PROC, meminfo: Path = Path("/proc/meminfo")) -> int | None:
    """Bytes of main memory that can be had now without swapping, and within the limits of control
    groups. None: unknown.

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
    """That of CUDA_HOME, else of the path, else of the usual place."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    places = (*([f"{home}/bin/nvcc"] if home else []), "nvcc", "/usr/local/cuda/bin/nvcc")
    return next((found for place in places if (found := shutil.which(place))), None)
