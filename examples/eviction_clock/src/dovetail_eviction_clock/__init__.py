"""An example plugin: the clock, or second chance, as an eviction policy for cached prefix blocks
(Corbató, 1968)."""

from __future__ import annotations

from typing import Any

from dovetail.plugin.hookspecs import hookimpl
from dovetail.plugin.provider import Options, Provider


class Clock:
    """Blocks in a ring. The hand passes over a block once more if it was asked for since the last
    time."""

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
    """One policy is made for each KV group, so what is built is what makes them."""
    return Clock


PROVIDER = Provider("clock", "a block that was used gets a second chance", build, priority=10)


# The hook is the prefix cache's own: where that is not installed it does not exist, and that is no
# mistake.
@hookimpl(optionalhook=True)
def dovetail_eviction_policies() -> list[Provider[type[Clock]]]:
    return [PROVIDER]
