"""Implement the host tier of the prefix cache: blocks evicted from the device move to host memory,
and come back when they are reused.

No kernel reads a host block. Moves are queued as block operations, which the worker executes in
order before the kernels of the next step, so a block may be allocated again as soon as the move out
of it is queued.
"""

from __future__ import annotations

from dovetail.engine.block_pool import BlockPool
from dovetail.errors import PluginError
from dovetail.interfaces.prefix_cache import TieredPrefixCache
from dovetail.types import BlockOp


class HostTier:
    """The host blocks of every KV group, which are free or cached. Their ids follow those of the
    group's device blocks."""

    def __init__(
        self, pools: list[BlockPool], num_blocks: list[int], block_ops: list[BlockOp]
    ) -> None:
        """Create a tier of `num_blocks` host blocks per group. Moves are appended to
        `block_ops`."""
        self.pools = pools
        self.num_blocks = num_blocks
        self.block_ops = block_ops
        self.num_evicted = {"host_full": 0, "to_host": 0}
        self.free: list[list[int]] = []
        self.cached: list[set[int]] = []
        self.clear()

    def clear(self) -> None:
        """Make all host blocks free."""
        first = [pool.num_blocks for pool in self.pools]
        ends = zip(first, self.num_blocks, strict=True)
        self.free = [list(range(n + num_host - 1, n - 1, -1)) for n, num_host in ends]
        self.cached = [set() for _ in self.pools]

    def make_room(self, cache: TieredPrefixCache, group: int, count: int) -> int:
        """Evict host blocks until `count` are free, as far as possible. Returns how many of the
        `count` are free."""
        free, cached = self.free[group], self.cached[group]
        if (lack := min(count - len(free), len(cached))) > 0:
            evicted = check_evicted(cache.evict_host(group, lack), lack, cached)
            cached.difference_update(evicted)
            free += evicted
            self.num_evicted["host_full"] += lack
        return min(count, len(free))

    def demote(self, cache: TieredPrefixCache, group: int, count: int) -> None:
        """Move the `count` least valuable evictable device blocks to free host blocks."""
        pool, free = self.pools[group], self.free[group]
        targets = free[-count:]
        blocks = check_evicted(cache.demote(group, targets), count, pool.evictable)
        del free[-count:]
        self.cached[group].update(targets)
        pool.free_evicted(blocks)
        first = pool.num_blocks
        for src, dst in zip(blocks, targets, strict=True):
            self.block_ops.append(BlockOp("out", group, src, dst - first))
        self.num_evicted["to_host"] += count

    def promote(self, group: int, host: list[int], blocks: list[int]) -> None:
        """Move claimed host blocks, which are no longer cached, to device blocks."""
        first = self.pools[group].num_blocks
        for src, dst in zip(host, blocks, strict=True):
            self.block_ops.append(BlockOp("in", group, src - first, dst))
        self.free[group] += host


def check_evicted(blocks: list[int], count: int, evictable: set[int]) -> list[int]:
    """Return the blocks that a prefix cache has evicted. Raises `PluginError` if they are not
    `count` different evictable blocks."""
    if len(set(blocks)) != count or len(blocks) != count or not evictable.issuperset(blocks):
        raise PluginError(
            f"the prefix cache was asked for {count} evictable blocks and returned {blocks[:8]}"
        )
    return blocks
