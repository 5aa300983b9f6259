"""A server: takes requests from outside and gives them to an engine."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dovetail.serving import AsyncEngine


class Server(Protocol):
    """What a server provider builds."""

    def run(self, engine: AsyncEngine, host: str, port: int, on_ready: Callable[[str], None]) -> None:
        """Serve until SIGINT or SIGTERM, drain, and return.

        Starts the engine itself, inside its event loop, answers 503 until that is ready, and then calls `on_ready`
        with the base URL. Raises what kept the engine from starting, or `ConfigError` if the address is taken.
        """
