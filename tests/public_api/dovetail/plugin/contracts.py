from __future__ import annotations
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from dovetail.errors import PluginError
GROUP = 'dovetail.contracts'
Version = tuple[int, ...]

@dataclass(frozen=True)
class Previous:
    version: str
    changed: str
    until: str
    adapt: Callable[[Any], Any]

@dataclass(frozen=True)
class WrittenFor:
    first: str
    last: str

    def includes(self, version: str) -> bool:
        ...

    def is_newer(self, version: str) -> bool:
        ...

def parse(value: str) -> WrittenFor:
    ...

def as_metadata(version: str) -> str:
    ...
