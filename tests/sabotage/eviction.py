"""Mistakes that eviction policies make, over the least recently used."""

from __future__ import annotations

from dovetail_prefix_cache import dovetail_eviction_policies
from dovetail_prefix_cache.eviction import LeastFrequentlyUsed, LeastRecentlyUsed
from sabotage import Sabotages

SABOTAGES = Sabotages("eviction", dovetail_eviction_policies()[0])
ONCE, ENGINE = "test_every_block_leaves_once", "test_engine_invariants_hold"
sabotage = SABOTAGES.of_class(lambda cls, context, options: cls)


@sabotage(ONCE)
class PopsTheUnknown(LeastRecentlyUsed):
    """When it has one block left, it names the one after it."""

    def pop(self):
        is_last = len(self._order) == 1
        return super().pop() + is_last


@sabotage(ONCE, ENGINE)
class PopsTwice(LeastRecentlyUsed):
    """What is popped stays."""

    def pop(self):
        return next(iter(self._order))


@sabotage(ONCE, ENGINE)
class RemoveLeavesIt(LeastRecentlyUsed):
    """A block that is in use again stays in the order."""

    def remove(self, block_id):
        pass


@sabotage(ONCE)
class LosesBlocks(LeastRecentlyUsed):
    """Past the fifth, a block that is added pushes out the first."""

    def add(self, block_id):
        super().add(block_id)
        if len(self._order) > 5:
            self._order.pop(next(iter(self._order)))


@sabotage(ONCE)
class ClearsNothing(LeastRecentlyUsed):
    """`clear` does nothing."""

    def clear(self):
        pass


@sabotage(ONCE, ENGINE)
class StaleHeap(LeastFrequentlyUsed):
    """Entries of blocks that were removed stay in the heap, and are popped."""

    def pop(self):
        block_id = self._heap.pop(0)[2]
        self._added_at.pop(block_id, None)
        return block_id


@sabotage("test_policies_do_not_meet", ENGINE)
class SharedBetweenGroups(LeastRecentlyUsed):
    """All policies of a process have one order."""

    order = {}  # noqa: RUF012

    def __init__(self, num_blocks):
        self._order = self.order
        self._order.clear()


def build_at_once(context, options):
    """The provider builds a policy, in place of what makes them."""
    return LeastRecentlyUsed(16)


SABOTAGES.add(build_at_once, (ONCE, ENGINE), build=build_at_once)
