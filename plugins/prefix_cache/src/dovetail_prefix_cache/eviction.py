"""The contract of the `eviction` extension point, and two policies.

A provider's `build` returns a `MakePolicy`; one policy is made for each KV group.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol


class EvictionPolicy(Protocol):
    """An order among the blocks that are kept and that no sequence uses.

    Blocks of one sequence are added from the last to the first; a block without the ones before it
    is of no use, so what was added first should, all else equal, go first.
    """

    def add(self, block_id: int) -> None:
        """A block is no longer in use. It is not here now; it may have been before, with the same
        content."""

    def remove(self, block_id: int) -> None:
        """A block that is here is in use again: somebody asked for what it holds."""

    def pop(self) -> int:
        """Take out the least valuable block: its content is forgotten. Never called when none is
        here."""

    def clear(self) -> None:
        """All is forgotten."""


class MakePolicy(Protocol):
    """Makes an empty policy for blocks 0 … num_blocks - 1."""

    def __call__(self, num_blocks: int) -> EvictionPolicy: ...


class LeastRecentlyUsed:
    """In the order in which they were added."""

    def __init__(self, num_blocks: int) -> None:
        # A plain dict would do but for `pop`: it looks for its first entry among those deleted
        # before.
        self._order: OrderedDict[int, None] = OrderedDict()

    def add(self, block_id: int) -> None:
        self._order[block_id] = None

    def remove(self, block_id: int) -> None:
        del self._order[block_id]

    def pop(self) -> int:
        return self._order.popitem(last=False)[0]

    def clear(self) -> None:
        self._order.clear()


class LeastFrequentlyUsed:
    """By how often a block was used since it was computed, then in the order in which they were
    added."""

    def __init__(self, num_blocks: int) -> None:
        self._num_uses = [0] * num_blocks
        self._time = 0
        self._added_at: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        """(uses, time, block): an entry counts if the block is here since that time."""

    def add(self, block_id: int) -> None:
        self._time += 1
        self._num_uses[block_id] += 1
        self._added_at[block_id] = self._time
        heapq.heappush(self._heap, (self._num_uses[block_id], self._time, block_id))
        if len(self._heap) > 2 * len(self._added_at) + 64:
            self._heap = [e for e in self._heap if self._added_at.get(e[2]) == e[1]]
            heapq.heapify(self._heap)

    def remove(self, block_id: int) -> None:
        del self._added_at[block_id]

    def pop(self) -> int:
        while True:
            _, time, block_id = heapq.heappop(self._heap)
            if self._added_at.get(block_id) == time:
                del self._added_at[block_id]
                self._num_uses[block_id] = 0
                return block_id

    def clear(self) -> None:
        self._num_uses = [0] * len(self._num_uses)
        self._added_at.clear()
        self._heap.clear()
