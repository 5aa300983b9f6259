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
    system: str
    machine: str
    num_cores: int
    memory_bytes: int
    cpu_flags: frozenset[str]
    compiler: str | None
    nvcc: str | None = None
    gpus: tuple[GpuFacts, ...] = ()
    gpu_trouble: str = ''

    @property
    def num_gpus(self) -> int:
        ...

    @property
    def devices(self) -> list[str]:
        ...

@functools.cache
def device_facts() -> DeviceFacts:
    ...

def usable_cores(num_cpus: float | None) -> int:
    ...

def available_memory(proc: Path=PROC, meminfo: Path=Path('/proc/meminfo')) -> int | None:
    ...
