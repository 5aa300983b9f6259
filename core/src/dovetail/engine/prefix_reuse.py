"""Implement the paged block manager with a prefix cache: cached blocks without references stay
evictable, and can be reused until their memory is needed.

The prefix cache is a plugin, and the block accounting here does not depend on its correctness. Its
answers are checked against the reference counts before anything is changed. If it fails, the
request concerned fails and the prefix cache is switched off.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from functools import partial
from typing import TypeVar

from dovetail.engine.kv_cache import NULL_BLOCK, PagedKVCache, num_unseen
from dovetail.errors import ConfigError, PluginError
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.sequence import Sequence
from dovetail.types import KVGroup

T = TypeVar("T")
EVICTION_FRACTION = 256
"""At least one block in this many is evicted at a time."""
log = logging.getLogger(__name__)


class ReusingKVCache(PagedKVCache):
    """A block manager in which an unreferenced block is either free, or evictable if the prefix
    cache knows its content."""

    def __init__(
        self, groups: list[KVGroup], num_blocks: list[int], prefix_cache: PrefixCache
    ) -> None:
        super().__init__(groups, num_blocks)
        if len(set(self._block_sizes)) > 1:
            raise ConfigError(
                "prefix_cache: requires the same block size in all KV groups; they have"
                f" {self._block_sizes}"
            )
        self.prefix_cache: PrefixCache | None = prefix_cache
        self.evictable: list[set[int]] = [set() for _ in groups]
        self.num_evicted = dict.fromkeys(("device_full", "reset"), 0)
        self._num_indexed: dict[int, int] = {}
        """Number of a sequence's first blocks that are in the prefix cache, by sequence."""
        self._waits_for: dict[int, int] = {}
        """First block that a sequence has to wait for, if known, by sequence."""
        self._lookups: dict[int, tuple[int, int]] = {}
        """Tokens looked up and found, by sequence for which nothing has been computed yet."""
        self._not_inserted: dict[int, tuple[Sequence, int]] = {}
        """Number of computed blocks, by sequence that inserts some of them when it leaves."""
        self._has_windows = any(g.window is not None for g in groups)

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        size = self._block_sizes[0]
        if self.prefix_cache is None or num_tokens < size:
            return 0
        limit = num_tokens // size
        try:
            if may_wait and self._must_wait(seq, self._waits_for.get(seq.seq_id, limit), limit):
                return None  # unchanged: avoid looking up all blocks again
            found = self.prefix_cache.match(seq, limit)
            if may_wait and self._must_wait(seq, len(found), limit):
                self._waits_for[seq.seq_id] = len(found)
                return None
            count = self._usable(found)
        except Exception as e:  # nothing was changed, so only this request fails
            self.faults.append((seq.seq_id, e))
            return 0
        self._waits_for.pop(seq.seq_id, None)
        heads = [
            self._seen(group, [ids[i] for ids in found[:count]])
            for i, group in enumerate(self.groups)
        ]
        if count and not self._call(seq.seq_id, lambda cache: self._claim(cache, heads), False):
            return 0
        if count:
            for pool, head in zip(self.pools, heads, strict=True):
                pool.share(head)
            self.tables[seq.seq_id] = heads
            self._num_indexed[seq.seq_id] = count
        # A preempted sequence finds its own blocks: these do not count as hits.
        if not (seq.num_prompt_counted or seq.num_output_tokens):
            seq.num_cached_tokens = count * size
            self._lookups[seq.seq_id] = num_tokens, count * size
        end = seq.num_prompt_tokens // size
        if end > count:
            self._call(seq.seq_id, lambda cache: cache.expect(seq, count, end), None)
        return count * size

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        if self.prefix_cache is None:
            return 0
        try:
            return (
                self._usable(self.prefix_cache.match(seq, num_tokens // self._block_sizes[0]))
                * self._block_sizes[0]
            )
        except Exception:  # `reuse` will meet the same error and report it
            return 0

    def _must_wait(self, seq: Sequence, block: int, limit: int) -> bool:
        """Return whether a running sequence is about to compute block `block` of this sequence."""
        if block >= limit or self.prefix_cache is None:
            return False
        owner = self.prefix_cache.expected_from(seq, block)
        # The owner must be running and not have computed the block yet. So every wait ends,
        # whatever the prefix cache answers.
        return (
            owner is not None and owner in self.tables and self._num_indexed.get(owner, 0) <= block
        )

    def _usable(self, found: list[tuple[int, ...]]) -> int:
        """Return the longest prefix for which every group has all blocks that the next token
        attends to."""
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

    @staticmethod
    def _seen(group: KVGroup, blocks: list[int]) -> list[int]:
        unseen = num_unseen(group, len(blocks) * group.block_size)
        return [NULL_BLOCK] * unseen + blocks[unseen:]

    def _claim(self, cache: PrefixCache, heads: list[list[int]]) -> bool:
        unreferenced = [
            [b for b in head if b != NULL_BLOCK and pool.references[b] == 0]
            for pool, head in zip(self.pools, heads, strict=True)
        ]
        for i, blocks in enumerate(unreferenced):
            if stale := [b for b in blocks if b not in self.evictable[i]]:
                raise PluginError(
                    f"the prefix cache returned blocks that are free: {stale[:8]} of KV group {i}"
                )
            cache.claim(i, blocks)
        # Last: if anything above fails, all evictable blocks become free.
        for evictable, blocks in zip(self.evictable, unreferenced, strict=True):
            evictable.difference_update(blocks)
        return True

    def _evict_blocks(self, seq_id: int, needed: list[int]) -> bool:
        short = [max(0, n - len(pool.free_ids)) for n, pool in zip(needed, self.pools, strict=True)]
        if any(n > len(blocks) for n, blocks in zip(short, self.evictable, strict=True)):
            return False
        for i, count in enumerate(short):
            if count:  # evict several at once, which is cheaper than one by one
                count = min(
                    max(count, self.num_blocks[i] // EVICTION_FRACTION), len(self.evictable[i])
                )
                self._call(seq_id, partial(self._evict, group=i, count=count), None)
        return True

    def _evict(self, cache: PrefixCache, group: int, count: int) -> None:
        blocks = self._check_evicted(cache.evict(group, count), count, self.evictable[group])
        self.evictable[group].difference_update(blocks)
        self.pools[group].free_ids += blocks
        self.num_evicted["device_full"] += count

    @staticmethod
    def _check_evicted(blocks: list[int], count: int, evictable: set[int]) -> list[int]:
        if len(set(blocks)) != count or len(blocks) != count or not evictable.issuperset(blocks):
            raise PluginError(
                f"the prefix cache was asked for {count} evictable blocks and returned {blocks[:8]}"
            )
        return blocks

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        if seq.seq_id not in self.tables:
            return
        # Counted only now, because a sequence that is not admitted looks up its blocks again.
        if seq.seq_id in self._lookups:
            queried, hit = self._lookups.pop(seq.seq_id)
            self.num_queried_tokens += queried
            self.num_hit_tokens += hit
        indexed, whole = self._num_indexed.get(seq.seq_id, 0), num_tokens // self._block_sizes[0]
        if whole > indexed:
            if indexed * self._block_sizes[0] < seq.num_prompt_tokens or self._has_windows:
                self._insert(seq, indexed, whole)
            # Output blocks are rarely needed before the sequence ends: insert them all at once,
            # which is cheaper.
            else:
                self._not_inserted[seq.seq_id] = seq, whole

    def _insert(self, seq: Sequence, first: int, end: int) -> None:
        """Insert blocks `first … end - 1` into the prefix cache."""
        blocks = [table[first:end] for table in self.tables[seq.seq_id]]
        self._num_indexed[seq.seq_id] = end
        self._call(seq.seq_id, lambda cache: cache.insert(seq, first, blocks), None)

    def free(self, seq_id: int) -> None:
        if seq_id in self._not_inserted:
            seq, whole = self._not_inserted.pop(seq_id)
            self._insert(seq, self._num_indexed.get(seq_id, 0), whole)
        # Blocks are released from last to first: among equally valuable blocks the end of a prefix
        # is evicted first.
        super().free(seq_id)
        for by_sequence in (self._num_indexed, self._waits_for, self._lookups):
            by_sequence.pop(seq_id, None)
        self._call(seq_id, lambda cache: cache.forget(seq_id), None)

    def _drop(self, seq_id: int, group: int, blocks: list[int]) -> None:
        unreferenced = self.pools[group].drop(blocks)
        cached = self._call(
            seq_id, lambda cache: {b for b in unreferenced if cache.keep(group, b)}, set[int]()
        )
        self.evictable[group] |= cached
        self.pools[group].free_ids += [b for b in unreferenced if b not in cached]

    def reset_prefix_cache(self) -> None:
        self.num_evicted["reset"] += sum(self.num_kept.values())
        self._call(-1, lambda cache: cache.reset(), None)
        self._free_evictable()

    def _free_evictable(self) -> None:
        for pool, evictable in zip(self.pools, self.evictable, strict=True):
            pool.free_ids += evictable
            evictable.clear()

    def _call(self, seq_id: int, call: Callable[[PrefixCache], T], otherwise: T) -> T:
        """Call a method of the prefix cache that changes its state. If it fails, so does the
        request. Its bookkeeping may be inconsistent then, so it is switched off."""
        if self.prefix_cache is None:
            return otherwise
        try:
            return call(self.prefix_cache)
        except Exception as e:
            log.error(
                "the prefix cache failed and has been switched off: %s: %s", type(e).__name__, e
            )
            self.faults.append((seq_id, e))
            self.prefix_cache = None
            self._free_evictable()
            return otherwise

    @property
    def num_kept(self) -> dict[str, int]:
        return {"device": sum(map(len, self.evictable))}

    @property
    def num_used(self) -> int:
        return super().num_used - sum(map(len, self.evictable))
