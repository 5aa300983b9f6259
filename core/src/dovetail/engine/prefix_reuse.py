"""The paged block manager with a prefix cache: blocks without references can be found again, until
they are needed.

The prefix cache is a plugin's; the books here do not depend on its being right. What it says is
checked against the reference counts before anything is changed, and a prefix cache that fails costs
the request that met it, and itself.
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
AT_ONCE = 256
"""This part of all blocks is evicted at a time, at least."""
log = logging.getLogger(__name__)


class ReusingKVCache(PagedKVCache):
    """A block without references is free, or kept: the prefix cache knows what it holds."""

    def __init__(
        self, groups: list[KVGroup], num_blocks: list[int], prefix_cache: PrefixCache
    ) -> None:
        super().__init__(groups, num_blocks)
        if len(set(self._block_sizes)) > 1:
            raise ConfigError(
                "prefix_cache: needs one block size in all KV groups; these have"
                f" {self._block_sizes}"
            )
        self.prefix_cache: PrefixCache | None = prefix_cache
        self.kept: list[set[int]] = [set() for _ in groups]
        self.num_evicted = dict.fromkeys(("device_full", "reset"), 0)
        self._num_known: dict[int, int] = {}
        """By sequence: its first blocks, of which the prefix cache has been told."""
        self._waits_for: dict[int, int] = {}
        """By sequence: the block that it has to wait for, as far as is known."""
        self._found: dict[int, tuple[int, int]] = {}
        """By sequence that nothing was computed for yet: tokens looked for, and found."""
        self._untold: dict[int, tuple[Sequence, int]] = {}
        """By sequence: blocks that are computed, of which the prefix cache is told when the
        sequence leaves."""
        self._has_windows = any(g.window is not None for g in groups)

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        size = self._block_sizes[0]
        if self.prefix_cache is None or num_tokens < size:
            return 0
        limit = num_tokens // size
        try:
            if may_wait and self._must_wait(seq, self._waits_for.get(seq.seq_id, limit), limit):
                return None  # as before: not worth looking for all blocks again
            found = self.prefix_cache.match(seq, limit)
            if may_wait and self._must_wait(seq, len(found), limit):
                self._waits_for[seq.seq_id] = len(found)
                return None
            count = self._usable(found)
        except Exception as e:  # nothing was changed, so that only this request is concerned
            self.faults.append((seq.seq_id, e))
            return 0
        self._waits_for.pop(seq.seq_id, None)
        heads = [
            self._seen(group, [ids[i] for ids in found[:count]])
            for i, group in enumerate(self.groups)
        ]
        if count and not self._ask(seq.seq_id, lambda cache: self._claim(cache, heads), False):
            return 0
        if count:
            for pool, head in zip(self.pools, heads, strict=True):
                pool.share(head)
            self.tables[seq.seq_id] = heads
            self._num_known[seq.seq_id] = count
        if not (
            seq.num_prompt_counted or seq.num_output_tokens
        ):  # one that was preempted finds its own
            seq.num_cached_tokens = count * size
            self._found[seq.seq_id] = num_tokens, count * size
        end = seq.num_prompt_tokens // size
        if end > count:
            self._ask(seq.seq_id, lambda cache: cache.expect(seq, count, end), None)
        return count * size

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        if self.prefix_cache is None:
            return 0
        try:
            return (
                self._usable(self.prefix_cache.match(seq, num_tokens // self._block_sizes[0]))
                * self._block_sizes[0]
            )
        except Exception:  # `reuse` will meet it too, and say so
            return 0

    def _must_wait(self, seq: Sequence, block: int, limit: int) -> bool:
        """Whether a sequence that runs is about to compute block `block` of this one."""
        if block >= limit or self.prefix_cache is None:
            return False
        owner = self.prefix_cache.expected_from(seq, block)
        # Whoever it is said to be must run and not have computed it: so every wait ends, whatever
        # the prefix cache says.
        return owner is not None and owner in self.tables and self._num_known.get(owner, 0) <= block

    def _usable(self, found: list[tuple[int, ...]]) -> int:
        """The longest beginning of which every group has all the blocks that a next token sees."""
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
        idle = [
            [b for b in head if b != NULL_BLOCK and pool.references[b] == 0]
            for pool, head in zip(self.pools, heads, strict=True)
        ]
        for i, blocks in enumerate(idle):
            if stale := [b for b in blocks if b not in self.kept[i]]:
                raise PluginError(
                    f"the prefix cache found free blocks: {stale[:8]} of KV group {i}"
                )
            cache.claim(i, blocks)
        for kept, blocks in zip(
            self.kept, idle, strict=True
        ):  # last: if it fails, all that is kept becomes free
            kept.difference_update(blocks)
        return True

    def _make_room(self, seq_id: int, needed: list[int]) -> bool:
        short = [max(0, n - len(pool.free_ids)) for n, pool in zip(needed, self.pools, strict=True)]
        if any(n > len(kept) for n, kept in zip(short, self.kept, strict=True)):
            return False
        for i, count in enumerate(short):
            if count:  # some more at once: giving up one by one costs more
                count = min(max(count, self.num_blocks[i] // AT_ONCE), len(self.kept[i]))
                self._ask(seq_id, partial(self._evict, group=i, count=count), None)
        return True

    def _evict(self, cache: PrefixCache, group: int, count: int) -> None:
        blocks = self._named(cache.evict(group, count), count, self.kept[group])
        self.kept[group].difference_update(blocks)
        self.pools[group].free_ids += blocks
        self.num_evicted["device_full"] += count

    @staticmethod
    def _named(blocks: list[int], count: int, kept: set[int]) -> list[int]:
        if len(set(blocks)) != count or len(blocks) != count or not kept.issuperset(blocks):
            raise PluginError(
                f"asked for {count} blocks that nobody uses, the prefix cache named {blocks[:8]}"
            )
        return blocks

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        if seq.seq_id not in self.tables:
            return
        if seq.seq_id in self._found:  # only now: one that finds no room asks again
            queried, hit = self._found.pop(seq.seq_id)
            self.num_queried_tokens += queried
            self.num_hit_tokens += hit
        known, whole = self._num_known.get(seq.seq_id, 0), num_tokens // self._block_sizes[0]
        if whole > known:
            if known * self._block_sizes[0] < seq.num_prompt_tokens or self._has_windows:
                self._insert(seq, known, whole)
            # its own words: hardly anybody needs them before it ends, and all at once costs less
            else:
                self._untold[seq.seq_id] = seq, whole

    def _insert(self, seq: Sequence, known: int, whole: int) -> None:
        """Tell the prefix cache of blocks `known … whole - 1`."""
        blocks = [table[known:whole] for table in self.tables[seq.seq_id]]
        self._num_known[seq.seq_id] = whole
        self._ask(seq.seq_id, lambda cache: cache.insert(seq, known, blocks), None)

    def free(self, seq_id: int) -> None:
        if seq_id in self._untold:
            seq, whole = self._untold.pop(seq_id)
            self._insert(seq, self._num_known.get(seq_id, 0), whole)
        # From the last block to the first: among blocks of equal worth the end of a prefix is the
        # first to go.
        super().free(seq_id)
        for by_sequence in (self._num_known, self._waits_for, self._found):
            by_sequence.pop(seq_id, None)
        self._ask(seq_id, lambda cache: cache.forget(seq_id), None)

    def _drop(self, seq_id: int, group: int, blocks: list[int]) -> None:
        idle = self.pools[group].drop(blocks)
        keep = self._ask(
            seq_id, lambda cache: {b for b in idle if cache.keep(group, b)}, set[int]()
        )
        self.kept[group] |= keep
        self.pools[group].free_ids += [b for b in idle if b not in keep]

    def reset_prefix_cache(self) -> None:
        self.num_evicted["reset"] += sum(self.num_kept.values())
        self._ask(-1, lambda cache: cache.reset(), None)
        self._free_kept()

    def _free_kept(self) -> None:
        for pool, kept in zip(self.pools, self.kept, strict=True):
            pool.free_ids += kept
            kept.clear()

    def _ask(self, seq_id: int, question: Callable[[PrefixCache], T], otherwise: T) -> T:
        """Ask the prefix cache what changes its books. If it fails, so does the request; and as the
        books are in doubt from then on, it is asked no more."""
        if self.prefix_cache is None:
            return otherwise
        try:
            return question(self.prefix_cache)
        except Exception as e:
            log.error("the prefix cache failed and is switched off: %s: %s", type(e).__name__, e)
            self.faults.append((seq_id, e))
            self.prefix_cache = None
            self._free_kept()
            return otherwise

    @property
    def num_kept(self) -> dict[str, int]:
        return {"device": sum(map(len, self.kept))}

    @property
    def num_used(self) -> int:
        return super().num_used - sum(map(len, self.kept))
