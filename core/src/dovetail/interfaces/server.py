"""A server: takes requests from outside and gives them to an engine."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from dovetail.serving import AsyncEngine


class Server(Protocol):
    """What a server provider builds."""

    def run(self, engine: AsyncEngine, host: str, port: int) -> None:
        """Serve until SIGINT or SIGTERM, drain, and return. Starts the engine itself, inside its event loop, and
        answers 503 until it is ready."""
