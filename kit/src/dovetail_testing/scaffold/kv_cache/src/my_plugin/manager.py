"""Own the blocks. A block holds the keys and values of `block_size` tokens, in every layer of a KV
group; block 0 of each group is the null block, which is never allocated. Only whole blocks are
shared, so no sequence ever writes to a shared one.
"""

from __future__ import annotations

from collections import Counter

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.types import BlockOp, KVGroup

NULL_BLOCK = 0


class MyPluginBlocks(KVCacheManager):
    """One object per engine. It inherits the methods that concern a prefix cache, and finds
    nothing."""

    def __init__(self, groups: list[KVGroup], num_blocks: list[int]) -> None:
        self.groups = groups
        self.num_blocks = num_blocks
        self.faults: list[tuple[int, Exception]] = []
        self.block_ops: list[BlockOp] = []
        self._free = [set(range(1, n)) for n in num_blocks]
        self._holders: list[Counter[int]] = [Counter() for _ in groups]
        """Number of sequences that reference a block, per group."""
        self._tables: dict[int, list[list[int]]] = {}
        """Blocks in order, by sequence and group."""

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        tables = self._tables.get(seq_id) or [[] for _ in self.groups]
        needed = [
            max(0, -(-num_tokens // g.block_size) - len(t))
            for g, t in zip(self.groups, tables, strict=True)
        ]
        if any(n > len(free) for n, free in zip(needed, self._free, strict=True)):
            return None  # all groups are checked before any is changed
        added = [[free.pop() for _ in range(n)] for n, free in zip(needed, self._free, strict=True)]
        self._tables[seq_id] = tables
        for i, blocks in enumerate(added):
            tables[i] += blocks
            self._holders[i].update(blocks)
        return added

    def share(self, source: int, target: int, num_tokens: int) -> int:
        unit = max(g.block_size for g in self.groups)  # a whole number of blocks in every group
        shared = num_tokens // unit * unit
        heads = [
            t[: shared // g.block_size]
            for g, t in zip(self.groups, self._tables[source], strict=True)
        ]
        if not shared or any(NULL_BLOCK in head for head in heads):
            return 0
        self._tables[target] = heads
        for holders, head in zip(self._holders, heads, strict=True):
            holders.update(head)
        return shared

    def block_ids(self, seq_id: int) -> list[list[int]]:
        return self._tables[seq_id]

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        for i, (group, table) in enumerate(zip(self.groups, self._tables[seq_id], strict=True)):
            if group.window is None:
                continue
            # The next token attends to the `window - 1` tokens before it: earlier blocks are not
            # needed any more.
            unseen = max(0, num_computed_tokens - group.window + 1) // group.block_size
            self._drop(i, table[:unseen])
            table[:unseen] = [NULL_BLOCK] * len(table[:unseen])

    def free(self, seq_id: int) -> None:
        for i, table in enumerate(self._tables.pop(seq_id, [])):
            self._drop(i, table)

    def _drop(self, group: int, blocks: list[int]) -> None:
        holders = self._holders[group]
        for block in blocks:
            if block != NULL_BLOCK:
                holders[block] -= 1
                if holders[block] == 0:
                    self._free[group].add(block)

    @property
    def num_used(self) -> int:
        return self.num_total - sum(map(len, self._free))

    @property
    def num_total(self) -> int:
        return sum(n - 1 for n in self.num_blocks)
