from __future__ import annotations
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from dovetail.errors import PluginError
if TYPE_CHECKING:
    from dovetail.provider import Reason
    from dovetail.sockets import Socket
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

def parse(value: str) -> WrittenFor:
    ...

def as_metadata(version: str) -> str:
    ...

def served(socket: Socket, written: WrittenFor | None) -> str | Reason:
    ...

def deprecation(socket: Socket, version: str) -> str | None:
    ...

def adapted(socket: Socket, version: str, built: Any) -> Any:
    ...
