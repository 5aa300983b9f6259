"""Mistakes that block managers make, over the core's own."""

from __future__ import annotations

from dovetail.assembly.builtins import dovetail_kv_caches
from dovetail.engine.block_pool import NULL_BLOCK
from dovetail.engine.kv_cache import PagedKVCache
from sabotage import Sabotages

SABOTAGES = Sabotages("kv_cache", dovetail_kv_caches()[0])
CONSERVED, LAST, ENGINE, BACK = (
    "test_blocks_are_conserved",
    "test_the_last_block_can_be_had",
    "test_an_engine_runs_on_it",
    "test_blocks_are_returned",
)
sabotage = SABOTAGES.of_class(
    lambda cls, context, o: cls(list(context.kv_groups), list(context.num_blocks))
)


@sabotage(CONSERVED)
class SharesPartialBlocks(PagedKVCache):
    """A block that is only partly filled is shared."""

    def share(self, source, target, num_tokens):
        tables = self.tables[source]
        heads = [
            t[: -(-num_tokens // g.block_size)] for t, g in zip(tables, self.groups, strict=True)
        ]
        if num_tokens == 0 or any(NULL_BLOCK in h for h in heads):
            return 0
        for pool, head in zip(self.pools, heads, strict=True):
            pool.share(head)
        self.tables[target] = heads
        return num_tokens


@sabotage(CONSERVED, LAST)
class NullBlockHandedOut(PagedKVCache):
    """Block 0 is on the free list."""

    def __init__(self, groups, num_blocks):
        super().__init__(groups, num_blocks)
        for pool in self.pools:
            pool.free_ids.append(NULL_BLOCK)

    @property
    def num_used(self):
        return max(0, super().num_used)


@sabotage(CONSERVED, BACK)
class FreesSharedBlocks(PagedKVCache):
    """A block is freed when the first of those that share it ends."""

    def free(self, seq_id):
        for pool, blocks in zip(self.pools, self.tables.get(seq_id, []), strict=False):
            for block in blocks:
                if block != NULL_BLOCK and pool.references[block] > 1:
                    pool.free_ids.append(block)
        super().free(seq_id)


@sabotage(CONSERVED, BACK)
class LeaksSharedBlocks(PagedKVCache):
    """A block that was shared is never freed."""

    def share(self, source, target, num_tokens):
        shared = super().share(source, target, num_tokens)
        if shared:
            for pool, head in zip(self.pools, self.tables[target], strict=True):
                pool.share(head[:1])
        return shared


@sabotage(CONSERVED, LAST)
class LastBlockKeptBack(PagedKVCache):
    """The last free block cannot be had."""

    def grow(self, seq_id, num_tokens):
        kept = [pool.free_ids.pop(0) if pool.free_ids else None for pool in self.pools]
        added = super().grow(seq_id, num_tokens)
        for pool, block in zip(self.pools, kept, strict=True):
            pool.free_ids[:0] = [block] if block is not None else []
        return added


@sabotage(CONSERVED)
class TakesBeforeItRefuses(PagedKVCache):
    """Blocks are taken of the first group before the second is found too small."""

    def grow(self, seq_id, num_tokens):
        added = super().grow(seq_id, num_tokens)
        if added is None and len(self.pools) > 1 and self.pools[0].free_ids:
            self.pools[0].take(1)
        return added


@sabotage(CONSERVED)
class TrimsTooMuch(PagedKVCache):
    """A window's first block is trimmed one token too early."""

    def trim(self, seq_id, num_computed_tokens):
        super().trim(seq_id, num_computed_tokens + 1)


@sabotage(CONSERVED)
class TrimsTooLittle(PagedKVCache):
    """The blocks that no token sees any more are kept."""

    def trim(self, seq_id, num_computed_tokens):
        pass


@sabotage(CONSERVED, ENGINE)
class TrimmedBlocksStayInTheTable(PagedKVCache):
    """A trimmed block is freed, and stays in the table: it is freed again with the sequence."""

    def trim(self, seq_id, num_computed_tokens):
        before = [list(t) for t in self.tables[seq_id]]
        super().trim(seq_id, num_computed_tokens)
        self.tables[seq_id] = before


@sabotage(CONSERVED)
class TrimsFullAttention(PagedKVCache):
    """The window of one group is taken for that of all."""

    def trim(self, seq_id, num_computed_tokens):
        windows = [g.window for g in self.groups if g.window is not None]
        groups = self.groups
        self.groups = [replace_window(g, windows[0]) for g in groups] if windows else groups
        super().trim(seq_id, num_computed_tokens)
        self.groups = groups


@sabotage(CONSERVED, LAST)
class HandsOutTwice(PagedKVCache):
    """Every fourth block that is handed out stays on the free list."""

    num_grown = 0

    def grow(self, seq_id, num_tokens):
        added = super().grow(seq_id, num_tokens)
        for pool, blocks in zip(self.pools, added or [], strict=False):
            for block in blocks:
                self.num_grown += 1
                if self.num_grown % 4 == 0:
                    pool.free_ids.append(block)
        return added


@sabotage(CONSERVED)
class CountsSharersTwice(PagedKVCache):
    """A block that two sequences share counts as two."""

    @property
    def num_used(self):
        return sum(b != NULL_BLOCK for tables in self.tables.values() for t in tables for b in t)


@sabotage(CONSERVED)
class TellsTheWrongBlocks(PagedKVCache):
    """The blocks added are told in another order than the table has."""

    def grow(self, seq_id, num_tokens):
        added = super().grow(seq_id, num_tokens)
        return None if added is None else [blocks[::-1] for blocks in added]


@sabotage("test_declaration")
class CountsTheNullBlock(PagedKVCache):
    """The null blocks count among those there are."""

    @property
    def num_total(self):
        return sum(self.num_blocks)


def replace_window(group, window):
    return type(group)(group.layers, "sliding", group.block_size, group.bytes_per_block, window)
