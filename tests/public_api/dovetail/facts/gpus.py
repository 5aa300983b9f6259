from __future__ import annotations
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from typing import Any

@dataclass(frozen=True)
class GpuFacts:
    name: str
    capability: tuple[int, int]
    memory_bytes: int
    cuda: tuple[int, int]

    @property
    def architecture(self) -> str:
        ...

def find_gpus(environ: Mapping[str, str]=os.environ, nvml: Any=None) -> tuple[tuple[GpuFacts, ...], str]:
    ...

def visible(wanted: str, uuids: Sequence[str]) -> list[int]:
    ...
