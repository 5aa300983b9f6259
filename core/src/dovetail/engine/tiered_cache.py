"""Implement the paged block manager with a prefix cache in two tiers: blocks evicted from the
device move to host memory, and come back when they are reused.

No kernel reads a host block. Moves are queued as block operations, which the worker executes in
order before the kernels of the next step, so a block may be allocated again as soon as the move out
of it is queued.
"""

from __future__ import annotations

from typing import Literal

from dovetail.engine.kv_cache import NULL_BLOCK
from dovetail.engine.prefix_reuse import ReusingKVCache
from dovetail.errors import PluginError
from dovetail.interfaces.prefix_cache import TieredPrefixCache
from dovetail.types import BlockOp, KVGroup


class TieredKVCache(ReusingKVCache):
    """A block manager with a host tier. In every KV group, ids of host blocks follow those of the
    device's blocks."""

    prefix_cache: TieredPrefixCache | None

    def __init__(
        self,
        groups: list[KVGroup],
        num_blocks: list[int],
        prefix_cache: TieredPrefixCache,
        num_host_blocks: list[int],
    ) -> None:
        super().__init__(groups, num_blocks, prefix_cache)
        self.num_host_blocks = num_host_blocks
        self.num_evicted = dict.fromkeys(("device_full", "host_full", "to_host", "reset"), 0)
        self.host_free: list[list[int]] = []
        self.host_cached: list[set[int]] = []
        """Host blocks that are in the prefix cache, per group."""
        self._free_host()

    def _usable(self, found: list[tuple[int, ...]]) -> int:
        """Limit the usable prefix also to what fits on the device."""
        count = super()._usable(found)
        while count and (short := self._num_short(found[:count])) > 0:
            count = super()._usable(found[: max(0, count - short)])
        return count

    def _num_short(self, found: list[tuple[int, ...]]) -> int:
        """Return how many device blocks are missing for the contents of host blocks, in the group
        where most are missing."""
        short = 0
        for i, group in enumerate(self.groups):
            unreferenced, host = self._split(i, self._seen(group, [ids[i] for ids in found]))
            num_available = len(self.pools[i].free_ids) + len(self.evictable[i]) - len(unreferenced)
            short = max(short, len(host) - num_available)
        return short

    def _split(self, group: int, head: list[int]) -> tuple[list[int], list[int]]:
        """Return the unreferenced device blocks and the host blocks in a list of blocks."""
        count, references = self.num_blocks[group], self.pools[group].references
        unreferenced = [b for b in head if b != NULL_BLOCK and b < count and references[b] == 0]
        return unreferenced, [b for b in head if b >= count]

    def _claim(self, cache: TieredPrefixCache, heads: list[list[int]]) -> bool:  # type: ignore[override]
        """Claim the blocks, and replace host blocks in `heads` with the device blocks to which
        their contents are moved."""
        unused = [self._split(i, head) for i, head in enumerate(heads)]
        for i, (unreferenced, host) in enumerate(unused):
            stale = [b for b in unreferenced if b not in self.evictable[i]] + [
                b for b in host if b not in self.host_cached[i]
            ]
            if stale:
                raise PluginError(
                    f"the prefix cache returned blocks that are free: {stale[:8]} of KV group {i}"
                )
            cache.claim(i, [*unreferenced, *host])
            self.host_cached[i].difference_update(host)
        targets = [self._fetch(cache, i, host) for i, (_, host) in enumerate(unused)]
        # Last: if anything above fails, all evictable blocks become free.
        for i, ((unreferenced, host), blocks) in enumerate(zip(unused, targets, strict=True)):
            self.evictable[i].difference_update(unreferenced)
            if host:
                del self.pools[i].free_ids[-len(host) :]
                self._move("in", i, host, blocks)
                self.host_free[i] += host
                moved = dict(zip(host, blocks, strict=True))
                heads[i][:] = [moved.get(b, b) for b in heads[i]]
        return True

    def _fetch(self, cache: TieredPrefixCache, group: int, host: list[int]) -> list[int]:
        """Return the free device blocks to which claimed host blocks move. Evicts blocks if there
        are not enough."""
        if not host:
            return []
        free_ids = self.pools[group].free_ids
        if len(free_ids) < len(host):
            self._evict(cache, group, len(host) - len(free_ids))
        blocks = free_ids[-len(host) :]
        cache.promote(group, host, blocks)
        return blocks

    def _evict(self, cache: TieredPrefixCache, group: int, count: int) -> None:  # type: ignore[override]
        free, cached = self.host_free[group], self.host_cached[group]
        if (lack := min(count - len(free), len(cached))) > 0:
            evicted = self._check_evicted(cache.evict_host(group, lack), lack, cached)
            cached.difference_update(evicted)
            free += evicted
            self.num_evicted["host_full"] += lack
        if count > len(free):  # the least valuable blocks do not fit into host memory
            super()._evict(cache, group, count - len(free))
            count = len(free)
        if count:
            targets = free[-count:]
            blocks = self._check_evicted(cache.demote(group, targets), count, self.evictable[group])
            del free[-count:]
            cached.update(targets)
            self.evictable[group].difference_update(blocks)
            self.pools[group].free_ids += blocks
            self._move("out", group, blocks, targets)
            self.num_evicted["to_host"] += count

    def _move(
        self, kind: Literal["in", "out"], group: int, sources: list[int], targets: list[int]
    ) -> None:
        first = self.num_blocks[group]
        for src, dst in zip(sources, targets, strict=True):
            if kind == "out":
                self.block_ops.append(BlockOp(kind, group, src, dst - first))
            else:
                self.block_ops.append(BlockOp(kind, group, src - first, dst))

    def _free_evictable(self) -> None:
        super()._free_evictable()
        self._free_host()

    def _free_host(self) -> None:
        ends = zip(self.num_blocks, self.num_host_blocks, strict=True)
        self.host_free = [list(range(n + num_host - 1, n - 1, -1)) for n, num_host in ends]
        self.host_cached = [set() for _ in self.groups]

    @property
    def num_kept(self) -> dict[str, int]:
        return {**super().num_kept, "host": sum(map(len, self.host_cached))}
