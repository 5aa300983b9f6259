"""Implement the blocks of one KV group: free list, reference counts and evictable blocks.

A block is a fixed number of KV slots. Blocks are allocated and shared whole (PagedAttention, arXiv
2309.06180). Only full blocks are shared, so no sequence ever writes to a shared block and
copy-on-write is not needed.
"""

from __future__ import annotations

from dovetail.types import KVGroup

NULL_BLOCK = 0


class BlockPool:
    """The blocks of one group, with ids 1 … num_blocks - 1. Each of them is in one of three states:
    referenced by sequences, free, or evictable, which means that no sequence references it but a
    prefix cache knows its content. Null blocks in a list of ids are skipped."""

    def __init__(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.free_ids = list(range(num_blocks - 1, NULL_BLOCK, -1))
        self.references = [0] * num_blocks
        self.evictable: set[int] = set()

    @property
    def num_used(self) -> int:
        """Number of blocks that sequences reference."""
        return self.num_blocks - 1 - len(self.free_ids) - len(self.evictable)

    def take(self, count: int) -> list[int]:
        """Allocate free blocks, each with one reference. The caller has checked that there are
        enough."""
        taken = self.free_ids[-count:][::-1] if count else []
        del self.free_ids[len(self.free_ids) - count :]
        for block in taken:
            self.references[block] = 1
        return taken

    def share(self, blocks: list[int]) -> None:
        """Add one reference to each block."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.references[block] += 1

    def drop(self, blocks: list[int]) -> list[int]:
        """Drop one reference each. Returns the blocks without references, which the caller makes
        free or evictable."""
        unreferenced = []
        for block in blocks:
            if block != NULL_BLOCK:
                self.references[block] -= 1
                if self.references[block] == 0:
                    unreferenced.append(block)
        return unreferenced

    def free_evicted(self, blocks: list[int]) -> None:
        """Make evictable blocks free."""
        self.evictable.difference_update(blocks)
        self.free_ids += blocks


def num_unseen(group: KVGroup, num_tokens: int) -> int:
    """Return the number of a sequence's first blocks that no token from position `num_tokens` on
    attends to: a token attends to itself and to window - 1 tokens before it."""
    return 0 if group.window is None else max(0, num_tokens - group.window + 1) // group.block_size


def blocks_per_sequence(group: KVGroup, max_model_len: int, chunk: int) -> int:
    """Return the maximum number of blocks that one sequence of `max_model_len` tokens can hold."""
    length = max_model_len if group.window is None else min(max_model_len, group.window + 2 * chunk)
    return -(-length // group.block_size) + (group.window is not None)
