from __future__ import annotations
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol
if TYPE_CHECKING:
    from dovetail.serving import AsyncEngine

class Server(Protocol):

    def run(self, engine: AsyncEngine, host: str, port: int, on_ready: Callable[[str], None]) -> None:
        ...
