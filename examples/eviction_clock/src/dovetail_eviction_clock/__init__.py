"""An example plugin: the clock (second chance) algorithm as an eviction policy for cached prefix
blocks (Corbató, 1968)."""

from __future__ import annotations

from typing import Any

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider


class Clock:
    """An eviction policy that keeps blocks in a ring. A block that was used since the hand last
    passed it is skipped once."""

    def __init__(self, num_blocks: int) -> None:
        self._ring: dict[int, None] = {}
        self._was_used: set[int] = set()

    def add(self, block_id: int) -> None:
        self._ring[block_id] = None

    def remove(self, block_id: int) -> None:
        del self._ring[block_id]
        self._was_used.add(block_id)

    def pop(self) -> int:
        while True:
            block_id = next(iter(self._ring))
            del self._ring[block_id]
            if block_id not in self._was_used:
                return block_id
            self._was_used.discard(block_id)
            self._ring[block_id] = None

    def clear(self) -> None:
        self._ring.clear()
        self._was_used.clear()


def build(context: Any, options: Options) -> type[Clock]:
    """Return the class, because the prefix cache creates one policy per KV group."""
    return Clock


PROVIDER = Provider("clock", "a block that was used gets a second chance", build, priority=10)


# The prefix cache plugin defines this hook. Without that plugin the hook does not exist, which is
# not an error.
@hookimpl(optionalhook=True)
def dovetail_eviction_policies() -> list[Provider[type[Clock]]]:
    return [PROVIDER]
