"""The paged block manager with a prefix cache in two tiers: what the device has no room for goes to
host memory, and comes back when it is found there.

A host block is never computed with. Moves are queued as block operations, which the worker does in
order before the kernels of the next step; so a block may be handed out again as soon as the move
out of it is queued.
"""

from __future__ import annotations

from typing import Literal

from dovetail.engine.kv_cache import NULL_BLOCK
from dovetail.engine.prefix_reuse import ReusingKVCache
from dovetail.errors import PluginError
from dovetail.interfaces.prefix_cache import TieredPrefixCache
from dovetail.types import BlockOp, KVGroup


class TieredKVCache(ReusingKVCache):
    """Ids of host blocks follow those of the device's, in every KV group."""

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
        self.host_kept: list[set[int]] = []
        """Per group: those that hold something."""
        self._free_host()

    def _usable(self, found: list[tuple[int, ...]]) -> int:
        """As much as there is room for on the device, too."""
        count = super()._usable(found)
        while count and (short := self._num_short(found[:count])) > 0:
            count = super()._usable(found[: max(0, count - short)])
        return count

    def _num_short(self, found: list[tuple[int, ...]]) -> int:
        """Blocks that the device lacks for those that are in host memory, in the group where it
        lacks most."""
        short = 0
        for i, group in enumerate(self.groups):
            idle, host = self._unused(i, self._seen(group, [ids[i] for ids in found]))
            short = max(
                short, len(host) - len(self.pools[i].free_ids) - (len(self.kept[i]) - len(idle))
            )
        return short

    def _unused(self, group: int, head: list[int]) -> tuple[list[int], list[int]]:
        """Of some blocks those on the device that no sequence uses, and those in host memory."""
        count, references = self.num_blocks[group], self.pools[group].references
        idle = [b for b in head if b != NULL_BLOCK and b < count and references[b] == 0]
        return idle, [b for b in head if b >= count]

    def _claim(self, cache: TieredPrefixCache, heads: list[list[int]]) -> bool:  # type: ignore[override]
        """Replaces host blocks in `heads` by those of the device to which their contents are
        moved."""
        unused = [self._unused(i, head) for i, head in enumerate(heads)]
        for i, (idle, host) in enumerate(unused):
            stale = [b for b in idle if b not in self.kept[i]] + [
                b for b in host if b not in self.host_kept[i]
            ]
            if stale:
                raise PluginError(
                    f"the prefix cache found free blocks: {stale[:8]} of KV group {i}"
                )
            cache.claim(i, [*idle, *host])
            self.host_kept[i].difference_update(host)
        targets = [self._fetch(cache, i, host) for i, (_, host) in enumerate(unused)]
        # Last: if anything fails before, all that is kept becomes free.
        for i, ((idle, host), blocks) in enumerate(zip(unused, targets, strict=True)):
            self.kept[i].difference_update(idle)
            if host:
                del self.pools[i].free_ids[-len(host) :]
                self._move("in", i, host, blocks)
                self.host_free[i] += host
                moved = dict(zip(host, blocks, strict=True))
                heads[i][:] = [moved.get(b, b) for b in heads[i]]
        return True

    def _fetch(self, cache: TieredPrefixCache, group: int, host: list[int]) -> list[int]:
        """The free blocks of the device, made free where there are not enough, that claimed host
        blocks move to."""
        if not host:
            return []
        free_ids = self.pools[group].free_ids
        if len(free_ids) < len(host):
            self._evict(cache, group, len(host) - len(free_ids))
        blocks = free_ids[-len(host) :]
        cache.promote(group, host, blocks)
        return blocks

    def _evict(self, cache: TieredPrefixCache, group: int, count: int) -> None:  # type: ignore[override]
        free, kept = self.host_free[group], self.host_kept[group]
        if (lack := min(count - len(free), len(kept))) > 0:
            gone = self._named(cache.evict_host(group, lack), lack, kept)
            kept.difference_update(gone)
            free += gone
            self.num_evicted["host_full"] += lack
        if count > len(
            free
        ):  # more than the host has room for: the least valuable ones are forgotten
            super()._evict(cache, group, count - len(free))
            count = len(free)
        if count:
            targets = free[-count:]
            blocks = self._named(cache.demote(group, targets), count, self.kept[group])
            del free[-count:]
            kept.update(targets)
            self.kept[group].difference_update(blocks)
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

    def _free_kept(self) -> None:
        super()._free_kept()
        self._free_host()

    def _free_host(self) -> None:
        ends = zip(self.num_blocks, self.num_host_blocks, strict=True)
        self.host_free = [list(range(n + num_host - 1, n - 1, -1)) for n, num_host in ends]
        self.host_kept = [set() for _ in self.groups]

    @property
    def num_kept(self) -> dict[str, int]:
        return {**super().num_kept, "host": sum(map(len, self.host_kept))}
