"""The paged block manager: free lists and reference counts, for any number of KV groups.

A block is a fixed number of KV slots. Blocks are handed out whole and shared whole (PagedAttention, arXiv 2309.06180);
because only full blocks are shared, nobody ever writes to a shared block and copy-on-write is never needed.
"""

from __future__ import annotations

from dovetail.types import KVGroup

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one group. Ids 1 … num_blocks - 1; a block with no references is on the free list."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self.references = [0] * num_blocks

    def take(self, count: int) -> list[int]:
        """Hand out blocks, each with one reference. The caller has checked that there are enough."""
        taken = self.free_ids[-count:][::-1] if count else []
        del self.free_ids[len(self.free_ids) - count :]
        for block in taken:
            self.references[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        for block in blocks:
            self.references[block] += 1

    def drop(self, blocks: list[int]) -> None:
        """Give back one reference each; null blocks are skipped."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.references[block] -= 1
                if self.references[block] == 0:
                    self.free_ids.append(block)


class PagedKVCache:
    """The built-in `KVCacheManager`; its interface says what each method promises."""

    def __init__(self, groups: list[KVGroup], num_blocks: list[int]) -> None:
        self.groups = groups
        self.num_blocks = num_blocks
        self.pools = [BlockPool(n) for n in num_blocks]
        self.tables: dict[int, list[list[int]]] = {}
        self._block_sizes = [g.block_size for g in groups]
        self._nothing: list[list[int]] = [[] for _ in groups]

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        table = self.tables.get(seq_id)
        if table is not None and len(table[0]) * self._block_sizes[0] >= num_tokens and len(table) == 1:
            return self._nothing  # by far the most frequent case
        needed = [-(-num_tokens // size) for size in self._block_sizes]
        if table is not None:
            needed = [max(0, n - len(blocks)) for n, blocks in zip(needed, table, strict=True)]
        if any(n > len(pool.free_ids) for n, pool in zip(needed, self.pools, strict=True)):
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
        # A multiple of every group's block size, so that all groups agree on how many tokens there are.
        unit = max(g.block_size for g in self.groups)
        num_shared = num_tokens // unit * unit
        heads = [blocks[: num_shared // g.block_size] for blocks, g in zip(table, self.groups, strict=True)]
        if num_shared == 0 or any(NULL_BLOCK in head for head in heads):
            return 0
        for pool, head in zip(self.pools, heads, strict=True):
            pool.share(head)
        self.tables[target] = [list(head) for head in heads]
        return num_shared

    def block_ids(self, seq_id: int) -> list[list[int]]:
        return self.tables[seq_id]

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        for group, pool, blocks in zip(self.groups, self.pools, self.tables[seq_id], strict=True):
            if group.window is None:
                continue
            # The next token, at position num_computed_tokens, sees window - 1 tokens before it.
            dead = max(0, num_computed_tokens - group.window + 1) // group.block_size
            for i in range(min(dead, len(blocks)) - 1, -1, -1):
                if blocks[i] == NULL_BLOCK:
                    break
                pool.drop([blocks[i]])
                blocks[i] = NULL_BLOCK

    def free(self, seq_id: int) -> None:
        for pool, blocks in zip(self.pools, self.tables.pop(seq_id, []), strict=False):
            pool.drop(blocks[::-1])

    @property
    def num_used(self) -> int:
        return self.num_total - sum(len(pool.free_ids) for pool in self.pools)

    @property
    def num_total(self) -> int:
        return sum(n - 1 for n in self.num_blocks)


def size_groups(groups: list[KVGroup], memory: int, max_model_len: int, max_num_seqs: int, chunk: int) -> list[int]:
    """Split `memory` bytes among the groups; returns blocks per group, the null block included.

    Each group gets blocks in proportion to what a sequence of full length needs of it, so that all groups run out
    together, and never more than `max_num_seqs` such sequences could use. `chunk` is the largest step, in tokens:
    a sliding group holds a window and two steps' tokens (one may be in flight), not the whole sequence.
    """
    per_seq = [blocks_per_sequence(g, max_model_len, chunk) for g in groups]
    seq_bytes = sum(n * g.bytes_per_block for n, g in zip(per_seq, groups, strict=True))
    num_seqs = min(memory / seq_bytes, float(max_num_seqs))
    return [1 + int(n * num_seqs) for n in per_seq]


def blocks_per_sequence(group: KVGroup, max_model_len: int, chunk: int) -> int:
    """The most blocks that one sequence of `max_model_len` tokens can hold at a time."""
    length = max_model_len if group.window is None else min(max_model_len, group.window + 2 * chunk)
    return -(-length // group.block_size) + (group.window is not None)
