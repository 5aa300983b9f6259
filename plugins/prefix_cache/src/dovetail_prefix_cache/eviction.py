"""Define the contract of the `eviction` extension point and two policies.

A provider's `build` returns a `MakePolicy`, which is called once per KV group.
"""

from __future__ import annotations

import heapq
from collections import OrderedDict
from typing import Protocol


class EvictionPolicy(Protocol):
    """The eviction order of cached blocks that no sequence uses.

    Blocks of one sequence are added from the last to the first. A block is useless without those
    before it, so among otherwise equal blocks the one added first should be evicted first.
    """

    def add(self, block_id: int) -> None:
        """Add a block that is no longer in use. It is not in the policy; it may have been before,
        with the same content."""

    def remove(self, block_id: int) -> None:
        """Remove a block of the policy that is in use again, because its content was requested."""

    def pop(self) -> int:
        """Remove and return the least valuable block, whose content is evicted. Never called if the
        policy is empty."""

    def clear(self) -> None:
        """Remove all blocks."""


class MakePolicy(Protocol):
    """Returns an empty policy for blocks 0 … num_blocks - 1."""

    def __call__(self, num_blocks: int) -> EvictionPolicy: ...


class LeastRecentlyUsed:
    """Evicts blocks in the order in which they were added."""

    def __init__(self, num_blocks: int) -> None:
        # Not a dict, because finding its first entry means skipping all deleted ones.
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
    """Evicts by number of uses since the block was computed, then in the order in which blocks were
    added."""

    def __init__(self, num_blocks: int) -> None:
        self._num_uses = [0] * num_blocks
        self._time = 0
        self._added_at: dict[int, int] = {}
        self._heap: list[tuple[int, int, int]] = []
        """(uses, time, block). An entry is valid if the block was last added at that time."""

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
