"""Implement the paged block manager: free lists and reference counts for any number of KV groups.

A block is a fixed number of KV slots. Blocks are allocated and shared whole (PagedAttention, arXiv
2309.06180). Only full blocks are shared, so no sequence ever writes to a shared block and
copy-on-write is not needed. `prefix_reuse.py` adds support for a prefix cache.
"""

from __future__ import annotations

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.types import BlockOp, KVGroup

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one group, with ids 1 … num_blocks - 1. Null blocks in a list of ids are
    skipped."""

    def __init__(self, num_blocks: int) -> None:
        self.free_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self.references = [0] * num_blocks

    def take(self, count: int) -> list[int]:
        """Allocate blocks, each with one reference. The caller has checked that there are
        enough."""
        taken = self.free_ids[-count:][::-1] if count else []
        del self.free_ids[len(self.free_ids) - count :]
        for block in taken:
            self.references[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            if block != NULL_BLOCK:
                self.references[block] += 1

    def drop(self, blocks: list[int]) -> list[int]:
        """Drop one reference each. Returns the blocks without references, which are not yet in the
        free list."""
        unreferenced = []
        for block in blocks:
            if block != NULL_BLOCK:
                self.references[block] -= 1
                if self.references[block] == 0:
                    unreferenced.append(block)
        return unreferenced


class PagedKVCache(KVCacheManager):
    """The built-in `KVCacheManager` without a prefix cache. The interface documents the methods."""

    def __init__(self, groups: list[KVGroup], num_blocks: list[int]) -> None:
        self.groups = groups
        self.num_blocks = num_blocks
        self.pools = [BlockPool(n) for n in num_blocks]
        self.tables: dict[int, list[list[int]]] = {}
        self.faults: list[tuple[int, Exception]] = []
        self.num_queried_tokens = self.num_hit_tokens = 0
        self.num_evicted: dict[str, int] = {}
        self.block_ops: list[BlockOp] = []
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
        if any(
            n > len(pool.free_ids) for n, pool in zip(needed, self.pools, strict=True)
        ) and not self._evict_blocks(seq_id, needed):
            return None
        added = [pool.take(n) for n, pool in zip(needed, self.pools, strict=True)]
        if table is None:
            self.tables[seq_id] = [list(blocks) for blocks in added]
        else:
            for blocks, new in zip(table, added, strict=True):
                blocks.extend(new)
        return added

    def _evict_blocks(self, seq_id: int, needed: list[int]) -> bool:
        """Evict blocks until each group has `needed` free ones. Return False, and change nothing,
        if that is not possible."""
        return False

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
        for i, blocks in enumerate(self.tables.pop(seq_id, [])):
            self._drop(seq_id, i, blocks[::-1])

    def _drop(self, seq_id: int, group: int, blocks: list[int]) -> None:
        self.pools[group].free_ids += self.pools[group].drop(blocks)

    @property
    def num_used(self) -> int:
        return self.num_total - sum(len(pool.free_ids) for pool in self.pools)

    @property
    def num_total(self) -> int:
        return sum(n - 1 for n in self.num_blocks)


def num_unseen(group: KVGroup, num_tokens: int) -> int:
    """Return the number of a sequence's first blocks that no token from position `num_tokens` on
    attends to: a token attends to itself and to window - 1 tokens before it."""
    return 0 if group.window is None else max(0, num_tokens - group.window + 1) // group.block_size
