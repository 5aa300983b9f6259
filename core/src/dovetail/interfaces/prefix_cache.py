"""Define the prefix cache: an index of computed blocks and their eviction order, so that requests
with a common prefix reuse its KV.

The KV-cache manager owns blocks and reference counts; a prefix cache owns none. It knows which
block holds the KV of which tokens, and which of the unreferenced blocks to evict first. It deals in
whole blocks of one size in all KV groups: "block i" of a sequence holds its tokens
`i * block_size … (i + 1) * block_size - 1`.

A `TieredPrefixCache` also indexes blocks in host memory. Their ids in a KV group follow those of
the device's blocks.
"""

from __future__ import annotations

from typing import Protocol

from dovetail.sequence import Sequence

NOT_HERE = 0
"""Block id that stands for "no block": block 0 of a group is the null block."""


class PrefixCache(Protocol):
    """An index of cached blocks; one object per engine. A block is cached from `insert` until
    `evict` or `reset` removes it.

    KV depends on all tokens before it and on the adapter, and must not be shared between salts.
    Block i of two sequences is therefore the same only if their first `(i + 1) * block_size`
    tokens, `request.adapter_id` and `request.cache_salt` are equal. An equal hash does not prove
    that.
    """

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        """Find the longest cached prefix of a sequence, at most `num_blocks` blocks.

        Entry i has the id of block i in every KV group, or `NOT_HERE` if the group does not cache
        it. The list ends before the first block that no group caches. The blocks found are not yet
        in use; `claim` may follow.
        """

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        """Index blocks `first, first + 1, …` of `seq`; `block_ids` has their ids per KV group.

        `NOT_HERE` stands for a block that has left the sliding window. Called once for each block
        of a sequence, in order, when the block is full and computed; blocks found by `match` are
        not inserted again. If an equal block is already cached, either of the two may stay.
        """

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        """Record that `seq` is running and about to compute its blocks `first … end - 1`, whose
        tokens are known.

        Other sequences that need one of these blocks wait for it instead of computing it as well.
        The record ends with `insert` of the block, `forget` of the sequence, or `reset`. Since
        contract 0.2.
        """

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        """Return the seq_id of a sequence that is expected to compute the content of block `block`
        of `seq`, or None if there is none.

        If several sequences are expected to compute it, any may be returned, or None once one of
        them has gone; the block is then computed twice. Since contract 0.2.
        """

    def claim(self, group: int, block_ids: list[int]) -> None:
        """Record that sequences use these unreferenced cached blocks again."""

    def keep(self, group: int, block_id: int) -> bool:
        """Record that the last reference to a block is gone. Return True if the block is cached: it
        stays so, and `evict` may return it. Return False if it is not; the manager then frees
        it."""

    def evict(self, group: int, count: int) -> list[int]:
        """Remove the `count` least valuable evictable blocks from the index and return their ids.

        The manager never asks for more than there are.
        """

    def forget(self, seq_id: int) -> None:
        """Record that the sequence has left the KV cache (it ended or was preempted). The blocks
        that it inserted stay cached."""

    def reset(self) -> None:
        """Remove all blocks from the index. The manager frees unreferenced blocks at once, and
        referenced ones when their last reference goes (`keep` then returns False)."""


class TieredPrefixCache(PrefixCache, Protocol):
    """A prefix cache with a host tier: its options have `host_memory_gb`, which is not 0. A cached
    block is on the device or on the host.

    `match` may find host blocks. No kernel reads those: the manager claims them with the others,
    which removes them from the eviction order, and calls `promote` with the device blocks to which
    their contents are copied. A host block is in use as long as it is cached.
    """

    def demote(self, group: int, host_blocks: list[int]) -> list[int]:
        """Move the least valuable evictable device blocks to the host blocks given, which are free.

        Returns one device block per entry of `host_blocks`, the least valuable first. The content
        of the first is indexed under the first host block from now on, and so on. The manager never
        asks for more than there are.
        """

    def promote(self, group: int, host_blocks: list[int], block_ids: list[int]) -> None:
        """Index the contents of claimed host blocks under the device blocks given, which are in
        use."""

    def evict_host(self, group: int, count: int) -> list[int]:
        """Do what `evict` does, for host blocks."""


CONTRACT = "0.2"
