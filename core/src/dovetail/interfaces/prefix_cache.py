"""Reuse of KV between requests that begin alike: an index of computed blocks, and the order in
which to give them up.

The KV-cache manager owns blocks and reference counts; a prefix cache owns none. It knows which
block holds the KV of which tokens, and of the blocks that no sequence refers to any more, which to
sacrifice first. Everything is in whole blocks, of one size in all KV groups; "block i" of a
sequence holds its tokens `i * block_size … (i + 1) * block_size - 1`.

A `TieredPrefixCache` also knows of blocks in host memory. Their ids in a KV group follow those of
the device's blocks.
"""

from __future__ import annotations

from typing import Protocol

from dovetail.sequence import Sequence

NOT_HERE = 0
"""Block 0 of a group is the null block: where a block id is expected it says that there is none."""


class PrefixCache(Protocol):
    """One object an engine. A block is known from `insert` on, until `evict` or `reset` forgets it.

    KV depends on all tokens before it, on the adapter, and must not be shared between salts: blocks
    i of two sequences are the same only if their first `(i + 1) * block_size` tokens,
    `request.adapter_id` and `request.cache_salt` are equal. A hash alone does not show that.
    """

    def match(self, seq: Sequence, num_blocks: int) -> list[tuple[int, ...]]:
        """Find the longest known beginning of a sequence, at most `num_blocks` blocks.

        Entry i has the id of block i in every KV group, `NOT_HERE` where the group's is not known;
        the list ends before the first block that no group knows. What is found is not yet in use:
        `claim` follows, or nothing does.
        """

    def insert(self, seq: Sequence, first: int, block_ids: list[list[int]]) -> None:
        """From now on blocks `first, first + 1, …` of `seq` can be found: per KV group, where they
        are.

        `NOT_HERE` stands for a block that fell out of a window. Called for a sequence's blocks in
        order, once each, when they are full and computed; what `match` found is not inserted again.
        If the same block is known elsewhere, either may be kept.
        """

    def expect(self, seq: Sequence, first: int, end: int) -> None:
        """`seq` runs from now on, and is about to compute its blocks `first … end - 1`, of known
        tokens.

        Others that need one of these wait for it rather than compute it as well. Until `insert`
        tells of the block, or `forget` of the sequence; `reset` ends it too. Since contract 0.2.
        """

    def expected_from(self, seq: Sequence, block: int) -> int | None:
        """The seq_id of a sequence that is expected to compute what block `block` of `seq` holds;
        None if there is none.

        Of several it may be any, or none once one of them has gone: then the block is computed
        twice. Since contract 0.2.
        """

    def claim(self, group: int, block_ids: list[int]) -> None:
        """Known blocks to which no sequence referred are in use again."""

    def keep(self, group: int, block_id: int) -> bool:
        """A sequence's last reference to a block is gone. True: it is known here, stays findable,
        and `evict` may name it; False: it is not, and the manager takes it back."""

    def evict(self, group: int, count: int) -> list[int]:
        """Forget `count` kept blocks that are not in use, the least valuable first, and return
        their ids.

        There are always as many.
        """

    def forget(self, seq_id: int) -> None:
        """The sequence has left the cache (ended, or was preempted); what it inserted stays
        known."""

    def reset(self) -> None:
        """Forget all blocks. Those in use are taken back by the manager when their last reference
        goes (`keep` answers False), those kept at once."""


class TieredPrefixCache(PrefixCache, Protocol):
    """One whose options have `host_memory_gb`, when that is not 0. What is known is in a block of
    the device or of the host.

    `match` may find host blocks. Nobody computes with those: the manager claims them with the
    others (they are then in no order of eviction), and tells by `promote` where it has their
    contents copied. A host block is kept as long as it is known.
    """

    def demote(self, group: int, host_blocks: list[int]) -> list[int]:
        """Of the kept device blocks that are not in use choose the least valuable ones, as many as
        there are `host_blocks`, which hold nothing; return them, the least valuable first. What the
        first held is from now on in the first host block, and so on, and is kept there. There are
        always as many."""

    def promote(self, group: int, host_blocks: list[int], block_ids: list[int]) -> None:
        """What claimed host blocks held is from now on in blocks of the device, which are in
        use."""

    def evict_host(self, group: int, count: int) -> list[int]:
        """`evict`, of host blocks."""


CONTRACT = "0.2"
