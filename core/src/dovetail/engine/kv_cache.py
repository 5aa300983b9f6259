"""Implement the paged block manager, for any number of KV groups.

`block_pool.py` has the blocks of one group. With a prefix cache, `prefix_reuse.py` decides which
cached blocks a sequence reuses and which ones are evicted.
"""

from __future__ import annotations

from dovetail.engine.block_pool import NULL_BLOCK, BlockPool, num_unseen
from dovetail.engine.prefix_reuse import PrefixReuse
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.prefix_cache import PrefixCache
from dovetail.sequence import Sequence
from dovetail.types import BlockOp, EngineStats, KVGroup


class PagedKVCache(KVCacheManager):
    """The built-in `KVCacheManager`. The interface documents the methods.

    It owns the block tables of sequences and one pool per group. `prefix` is None without a prefix
    cache.
    """

    def __init__(
        self,
        groups: list[KVGroup],
        num_blocks: list[int],
        prefix_cache: PrefixCache | None = None,
        num_host_blocks: list[int] | None = None,
    ) -> None:
        """Create a manager. If `num_host_blocks` is given, `prefix_cache` is a
        `TieredPrefixCache`, and blocks evicted from the device move to the host."""
        self.groups = groups
        self.num_blocks = num_blocks
        self.pools = [BlockPool(n) for n in num_blocks]
        self.tables: dict[int, list[list[int]]] = {}
        self.faults: list[tuple[int, Exception]] = []
        self.block_ops: list[BlockOp] = []
        self.prefix = (
            None
            if prefix_cache is None
            else PrefixReuse(
                groups, self.pools, prefix_cache, num_host_blocks, self.faults, self.block_ops
            )
        )
        self._block_sizes = [g.block_size for g in groups]
        self._nothing: list[list[int]] = [[] for _ in groups]

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        table = self.tables.get(seq_id)
        if (
            table is not None
            and len(table[0]) * self._block_sizes[0] >= num_tokens
            and len(table) == 1
        ):
            return self._nothing  # the most frequent case
        needed = [-(-num_tokens // size) for size in self._block_sizes]
        if table is not None:
            needed = [max(0, n - len(blocks)) for n, blocks in zip(needed, table, strict=True)]
        short = [max(0, n - len(p.free_ids)) for n, p in zip(needed, self.pools, strict=True)]
        if any(short) and not (self.prefix is not None and self.prefix.evict(seq_id, short)):
            return None
        added = [pool.take(n) for n, pool in zip(needed, self.pools, strict=True)]
        if table is None:
            self.tables[seq_id] = [list(blocks) for blocks in added]
        else:
            for blocks, new in zip(table, added, strict=True):
                blocks.extend(new)
        return added

    def share(self, source: int, target: int, num_tokens: int) -> int:
        table = self.tables[source]
        # A multiple of every group's block size, so that all groups share the same number of
        # tokens.
        unit = max(g.block_size for g in self.groups)
        num_shared = num_tokens // unit * unit
        heads = [
            blocks[: num_shared // g.block_size]
            for blocks, g in zip(table, self.groups, strict=True)
        ]
        if num_shared == 0 or any(NULL_BLOCK in head for head in heads):
            return 0
        for pool, head in zip(self.pools, heads, strict=True):
            pool.share(head)
        self.tables[target] = [list(head) for head in heads]
        return num_shared

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        if self.prefix is None:
            return 0
        heads = self.prefix.reuse(seq, num_tokens, may_wait=may_wait, running=self.tables)
        if not heads:
            return None if heads is None else 0
        self.tables[seq.seq_id] = heads
        return len(heads[0]) * self._block_sizes[0]

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        return 0 if self.prefix is None else self.prefix.num_cached(seq, num_tokens)

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        if self.prefix is not None and (table := self.tables.get(seq.seq_id)) is not None:
            self.prefix.computed(seq, num_tokens, table)

    def reset_prefix_cache(self) -> None:
        if self.prefix is not None:
            self.prefix.reset()

    def block_ids(self, seq_id: int) -> list[list[int]]:
        return self.tables[seq_id]

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        for i, (group, blocks) in enumerate(zip(self.groups, self.tables[seq_id], strict=True)):
            for at in range(min(num_unseen(group, num_computed_tokens), len(blocks)) - 1, -1, -1):
                if blocks[at] == NULL_BLOCK:
                    break
                self._drop(seq_id, i, [blocks[at]])
                blocks[at] = NULL_BLOCK

    def free(self, seq_id: int) -> None:
        table = self.tables.pop(seq_id, [])
        if self.prefix is not None:
            self.prefix.insert_rest(seq_id, table)
        # From last to first: among equally valuable blocks the end of a prefix is evicted first.
        for i, blocks in enumerate(table):
            self._drop(seq_id, i, blocks[::-1])
        if self.prefix is not None:
            self.prefix.forget(seq_id)

    def _drop(self, seq_id: int, group: int, blocks: list[int]) -> None:
        pool = self.pools[group]
        unreferenced = pool.drop(blocks)
        if self.prefix is not None:
            unreferenced = self.prefix.keep(seq_id, group, unreferenced)
        pool.free_ids += unreferenced

    @property
    def num_used(self) -> int:
        return sum(pool.num_used for pool in self.pools)

    @property
    def num_total(self) -> int:
        return sum(n - 1 for n in self.num_blocks)

    def count(self, stats: EngineStats) -> None:
        if self.prefix is not None:
            self.prefix.count(stats)
