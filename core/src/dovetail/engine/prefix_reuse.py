"""Decide, for the paged block manager, which cached blocks a sequence reuses, and keep the prefix
cache informed about computed, evicted and unreferenced blocks.

The prefix cache is a plugin, and the block accounting here does not depend on its correctness. Its
answers are checked against the reference counts before anything is changed. If it fails, the
request concerned fails and the prefix cache is switched off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Container
from dataclasses import dataclass
from functools import partial
from typing import Any, TypeVar, cast

from dovetail.engine.block_pool import NULL_BLOCK, BlockPool, num_unseen
from dovetail.engine.host_tier import HostTier, check_evicted
from dovetail.errors import ConfigError, PluginError
from dovetail.interfaces.prefix_cache import PrefixCache, TieredPrefixCache
from dovetail.sequence import Sequence
from dovetail.types import BlockOp, EngineStats, KVGroup

T = TypeVar("T")
EVICTION_FRACTION = 256
"""At least one block in this many is evicted at a time."""
log = logging.getLogger(__name__)


@dataclass(slots=True)
class Record:
    """What is known about a sequence's use of the prefix cache, until its blocks are freed."""

    num_indexed: int = 0
    """Number of its first blocks that are in the prefix cache."""
    waits_for: int | None = None
    """The first block that it has to wait for, if known."""
    lookup: tuple[int, int] | None = None
    """Numbers of tokens looked up and found, until the sequence has computed something."""
    to_insert: tuple[Sequence, int] | None = None
    """Number of computed blocks, if some of them are to be inserted when the sequence leaves."""


class PrefixReuse:
    """The part of the block manager that talks to the prefix cache. It reads and changes the pools
    of the manager, and appends to the manager's `faults` and `block_ops`."""

    def __init__(
        self,
        groups: list[KVGroup],
        pools: list[BlockPool],
        cache: PrefixCache,
        num_host_blocks: list[int] | None,
        faults: list[tuple[int, Exception]],
        block_ops: list[BlockOp],
    ) -> None:
        sizes = [g.block_size for g in groups]
        if len(set(sizes)) > 1:
            raise ConfigError(
                f"prefix_cache: requires the same block size in all KV groups; they have {sizes}"
            )
        self.groups = groups
        self.pools = pools
        self.cache: PrefixCache | None = cache
        """None once it has failed."""
        self.host = HostTier(pools, num_host_blocks, block_ops) if num_host_blocks else None
        self.faults = faults
        self.num_queried_tokens = self.num_hit_tokens = 0
        self.num_evicted = {"device_full": 0, "reset": 0}
        self._size = sizes[0]
        self._records: dict[int, Record] = {}
        self._has_windows = any(g.window is not None for g in groups)

    # A sequence starts.

    def reuse(
        self, seq: Sequence, num_tokens: int, *, may_wait: bool, running: Container[int]
    ) -> list[list[int]] | None:
        """Do what `KVCacheManager.reuse` describes. `running` has the ids of the sequences that
        hold blocks.

        Returns the blocks found per group, with references for `seq`; an empty list if there are
        none; or None if the sequence must wait.
        """
        limit = num_tokens // self._size
        if self.cache is None or not limit:
            return []
        record = self._records.setdefault(seq.seq_id, Record())
        try:
            if may_wait and self._must_wait(seq, record.waits_for, limit, running):
                return None  # unchanged: avoid looking up all blocks again
            found = self.cache.match(seq, limit)
            if may_wait and self._must_wait(seq, len(found), limit, running):
                record.waits_for = len(found)
                return None
            count = self._num_usable(found)
        except Exception as e:  # nothing was changed, so only this request fails
            self.faults.append((seq.seq_id, e))
            return []
        record.waits_for = None
        heads = [
            self._seen(group, [ids[i] for ids in found[:count]])
            for i, group in enumerate(self.groups)
        ]
        if count and not self._call(seq.seq_id, lambda cache: self._claim(cache, heads), False):
            return []
        if count:
            for pool, head in zip(self.pools, heads, strict=True):
                pool.share(head)
            record.num_indexed = count
        # A preempted sequence finds its own blocks: these do not count as hits.
        if not (seq.num_prompt_counted or seq.num_output_tokens):
            seq.num_cached_tokens = count * self._size
            record.lookup = num_tokens, count * self._size
        end = seq.num_prompt_tokens // self._size
        if end > count:
            self._call(seq.seq_id, lambda cache: cache.expect(seq, count, end), None)
        return heads if count else []

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        if self.cache is None:
            return 0
        try:
            return self._num_usable(self.cache.match(seq, num_tokens // self._size)) * self._size
        except Exception:  # `reuse` will meet the same error and report it
            return 0

    def _must_wait(
        self, seq: Sequence, block: int | None, limit: int, running: Container[int]
    ) -> bool:
        """Return whether a running sequence is about to compute block `block` of this sequence."""
        if block is None or block >= limit or self.cache is None:
            return False
        owner = self.cache.expected_from(seq, block)
        if owner is None or owner not in running:
            return False
        # The owner must be running and not have computed the block yet. So every wait ends,
        # whatever the prefix cache answers.
        record = self._records.get(owner)
        return record is None or record.num_indexed <= block

    def _num_usable(self, found: list[tuple[int, ...]]) -> int:
        """Return the length of the longest usable prefix. What is found on the host is usable as
        far as it fits on the device."""
        count = self._num_contiguous(found)
        while self.host is not None and count and (short := self._num_short(found[:count])) > 0:
            count = self._num_contiguous(found[: max(0, count - short)])
        return count

    def _num_contiguous(self, found: list[tuple[int, ...]]) -> int:
        """Return the length of the longest prefix for which every group has all blocks that the
        next token attends to."""
        runs, usable = [0] * len(self.groups), 0
        for count, ids in enumerate(found, 1):
            runs = [
                run + 1 if block != NULL_BLOCK else 0 for run, block in zip(runs, ids, strict=True)
            ]
            if all(
                run >= count - num_unseen(g, count * g.block_size)
                for run, g in zip(runs, self.groups, strict=True)
            ):
                usable = count
        return usable

    def _num_short(self, found: list[tuple[int, ...]]) -> int:
        """Return how many device blocks are missing for the contents of host blocks, in the group
        where most are missing."""
        short = 0
        for i, (group, pool) in enumerate(zip(self.groups, self.pools, strict=True)):
            unreferenced, host = self._split(pool, self._seen(group, [ids[i] for ids in found]))
            num_available = len(pool.free_ids) + len(pool.evictable) - len(unreferenced)
            short = max(short, len(host) - num_available)
        return short

    @staticmethod
    def _seen(group: KVGroup, blocks: list[int]) -> list[int]:
        unseen = num_unseen(group, len(blocks) * group.block_size)
        return [NULL_BLOCK] * unseen + blocks[unseen:]

    @staticmethod
    def _split(pool: BlockPool, blocks: list[int]) -> tuple[list[int], list[int]]:
        """Return the unreferenced device blocks and the host blocks in a list of blocks."""
        host = [b for b in blocks if b >= pool.num_blocks]
        device = [b for b in blocks if b != NULL_BLOCK and not b >= pool.num_blocks]
        return [b for b in device if pool.references[b] == 0], host

    def _claim(self, cache: PrefixCache, heads: list[list[int]]) -> bool:
        """Claim the blocks, and replace host blocks in `heads` with the device blocks to which
        their contents are moved."""
        parts = [self._split(pool, head) for pool, head in zip(self.pools, heads, strict=True)]
        for i, (unreferenced, host) in enumerate(parts):
            on_host = self.host.cached[i] if self.host is not None else set[int]()
            stale = [b for b in unreferenced if b not in self.pools[i].evictable]
            if stale := stale + [b for b in host if b not in on_host]:
                raise PluginError(
                    f"the prefix cache returned blocks that are free: {stale[:8]} of KV group {i}"
                )
            cache.claim(i, [*unreferenced, *host])
            on_host.difference_update(host)
        targets = [self._fetch(cache, i, host) for i, (_, host) in enumerate(parts)]
        # Last: if anything above fails, all evictable blocks become free.
        for i, ((unreferenced, host), blocks) in enumerate(zip(parts, targets, strict=True)):
            self.pools[i].evictable.difference_update(unreferenced)
            if host and self.host is not None:
                del self.pools[i].free_ids[-len(host) :]
                self.host.promote(i, host, blocks)
                moved = dict(zip(host, blocks, strict=True))
                heads[i][:] = [moved.get(b, b) for b in heads[i]]
        return True

    def _fetch(self, cache: PrefixCache, group: int, host: list[int]) -> list[int]:
        """Return the free device blocks to which claimed host blocks move. Evicts blocks if there
        are not enough."""
        if not host:
            return []
        free_ids = self.pools[group].free_ids
        if len(free_ids) < len(host):
            self._evict(cache, group, len(host) - len(free_ids))
        blocks = free_ids[-len(host) :]
        cast("TieredPrefixCache", cache).promote(group, host, blocks)
        return blocks

    # A sequence runs.

    def computed(self, seq: Sequence, num_tokens: int, table: list[list[int]]) -> None:
        """Do what `KVCacheManager.computed` describes; `table` has the blocks of `seq`."""
        record = self._records.setdefault(seq.seq_id, Record())
        # Counted only now, because a sequence that is not admitted looks up its blocks again.
        if record.lookup is not None:
            self.num_queried_tokens += record.lookup[0]
            self.num_hit_tokens += record.lookup[1]
            record.lookup = None
        whole = num_tokens // self._size
        if whole > record.num_indexed:
            if record.num_indexed * self._size < seq.num_prompt_tokens or self._has_windows:
                self._insert(record, seq, whole, table)
            else:
                # Output blocks are rarely needed before the sequence ends: insert them all at once,
                # which is cheaper.
                record.to_insert = seq, whole

    def _insert(self, record: Record, seq: Sequence, end: int, table: list[list[int]]) -> None:
        """Insert the blocks that are not in the prefix cache yet, up to block `end - 1`."""
        first, record.num_indexed = record.num_indexed, end
        blocks = [ids[first:end] for ids in table]
        self._call(seq.seq_id, lambda cache: cache.insert(seq, first, blocks), None)

    # A sequence leaves.

    def insert_rest(self, seq_id: int, table: list[list[int]]) -> None:
        """Insert the computed blocks that are not in the prefix cache yet. Called before the blocks
        of the sequence are dropped."""
        record = self._records.get(seq_id)
        if record is not None and record.to_insert is not None:
            seq, whole = record.to_insert
            self._insert(record, seq, whole, table)

    def keep(self, seq_id: int, group: int, unreferenced: list[int]) -> list[int]:
        """Make those blocks evictable whose content is cached. Returns the others."""
        cached = self._call(
            seq_id, lambda cache: {b for b in unreferenced if cache.keep(group, b)}, set[int]()
        )
        self.pools[group].evictable |= cached
        return [b for b in unreferenced if b not in cached]

    def forget(self, seq_id: int) -> None:
        """Record that the blocks of a sequence have been freed."""
        self._records.pop(seq_id, None)
        self._call(seq_id, lambda cache: cache.forget(seq_id), None)

    # Eviction.

    def evict(self, seq_id: int, short: list[int]) -> bool:
        """Free at least `short` blocks in each group, for a sequence. Returns False, and changes
        nothing, if that is not possible."""
        if any(n > len(pool.evictable) for n, pool in zip(short, self.pools, strict=True)):
            return False
        for i, (count, pool) in enumerate(zip(short, self.pools, strict=True)):
            if count:  # evict several at once, which is cheaper than one by one
                at_least = max(count, pool.num_blocks // EVICTION_FRACTION)
                count = min(at_least, len(pool.evictable))
                self._call(seq_id, partial(self._evict, group=i, count=count), None)
        return True

    def _evict(self, cache: PrefixCache, group: int, count: int) -> None:
        """Free `count` evictable device blocks. Those that the host has room for move there."""
        pool, room = self.pools[group], 0
        tiered = cast("TieredPrefixCache", cache)
        if self.host is not None:
            room = self.host.make_room(tiered, group, count)
        if lost := count - room:  # the least valuable ones
            pool.free_evicted(check_evicted(cache.evict(group, lost), lost, pool.evictable))
            self.num_evicted["device_full"] += lost
        if self.host is not None and room:
            self.host.demote(tiered, group, room)

    def reset(self) -> None:
        """Forget everything cached so far."""
        self.num_evicted["reset"] += sum(self.num_evictable.values())
        self._call(-1, lambda cache: cache.reset(), None)
        self._free_evictable()

    def _free_evictable(self) -> None:
        for pool in self.pools:
            pool.free_ids += pool.evictable
            pool.evictable.clear()
        if self.host is not None:
            self.host.clear()

    def _call(self, seq_id: int, call: Callable[[Any], T], otherwise: T) -> T:
        """Call a method of the prefix cache that changes its state. If it fails, so does the
        request. Its bookkeeping may be inconsistent then, so it is switched off."""
        if self.cache is None:
            return otherwise
        try:
            return call(self.cache)
        except Exception as e:
            log.error(
                "the prefix cache failed and has been switched off: %s: %s", type(e).__name__, e
            )
            self.faults.append((seq_id, e))
            self.cache = None
            self._free_evictable()
            return otherwise

    @property
    def num_evictable(self) -> dict[str, int]:
        """Number of evictable blocks over all groups, by tier."""
        on_device = {"device": sum(len(pool.evictable) for pool in self.pools)}
        on_host = {"host": sum(map(len, self.host.cached))} if self.host is not None else {}
        return on_device | on_host

    def count(self, stats: EngineStats) -> None:
        stats.num_prefix_queried_tokens = self.num_queried_tokens
        stats.num_prefix_hit_tokens = self.num_hit_tokens
        on_host = self.host.num_evicted if self.host is not None else {}
        stats.num_prefix_evicted_blocks = self.num_evicted | on_host
        stats.num_prefix_blocks = self.num_evictable
