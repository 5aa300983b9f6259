"""Who owns the blocks: the free lists and the reference counts. Plain Python, no tensor, one object
an engine."""

from __future__ import annotations

from typing import Protocol

from dovetail.sequence import Sequence
from dovetail.types import BlockOp, KVGroup


class KVCacheManager(Protocol):
    """Hands out blocks of every KV group to sequences. Block 0 of a group is the null block, which
    is never handed out.

    A manager that asks no prefix cache may inherit what has to do with one.
    """

    groups: list[KVGroup]
    num_blocks: list[int]
    """Per group, the null block included."""

    faults: list[tuple[int, Exception]]
    """Requests that must fail, by the seq_id of one of their sequences, and why; the engine takes
    them out."""

    num_queried_tokens: int
    """That `reuse` looked for, so far; of these found:"""
    num_hit_tokens: int

    num_evicted: dict[str, int]
    """Blocks that the prefix cache has forgotten so far, by cause: `device_full`, `host_full`,
    `reset`; or moved: `to_host`."""
    block_ops: list[BlockOp]
    """Moves to be done, in this order, before the kernels of the next step; the engine takes them
    out."""

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        """Give a sequence room for its first `num_tokens` tokens.

        Returns the blocks added, per group, in order (mostly empty lists), or None if there are not
        enough: then nothing has changed. Room once given lasts until `free`, `trim` aside.
        """

    def share(self, source: int, target: int, num_tokens: int) -> int:
        """Let a new sequence `target` use the blocks that hold the first tokens of `source`, at
        most `num_tokens`.

        Only whole blocks are shared, so nobody ever writes to a shared block. Returns how many
        tokens `target` now has, 0 when nothing could be shared (then `target` is still unknown).
        """

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        """Give a new sequence the blocks in which its first tokens' KV is found computed, at most
        `num_tokens` tokens.

        Returns how many tokens it now has; 0 when nothing was found (then it is still unknown). A
        manager without a prefix cache finds nothing.

        None, only to those who say that the sequence `may_wait`: not now, a running sequence is
        about to compute the next block that this one needs. Nothing has changed; ask again in the
        next step, and go on with the next sequence meanwhile. The one waited for holds blocks, so
        whoever waits never waits for one that waits.
        """
        return 0

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        """How many of a waiting sequence's first `num_tokens` tokens `reuse` would find now.
        Changes nothing."""
        return 0

    def reset_prefix_cache(self) -> None:
        """Find nothing of what has been computed so far. Sequences that run keep their blocks."""
        return None

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        """The KV of the first `num_tokens` tokens of a sequence is in its blocks: others may reuse
        it, from now on or, if it is output, when the sequence leaves.

        Called when the step that computed them has ended well, if not after every step; not for
        unknown sequences' sake an error.
        """
        return None

    def block_ids(self, seq_id: int) -> list[list[int]]:
        """The block tables of a sequence, per group. A trimmed entry is the null block."""

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        """Take back the blocks that no later token can see (sliding windows). Call when no step in
        flight reads them."""

    def free(self, seq_id: int) -> None:
        """Drop a sequence's references, if it has any. Call when no step in flight uses them."""

    @property
    def num_used(self) -> int:
        """Blocks that sequences refer to, over all groups."""

    @property
    def num_kept(self) -> dict[str, int]:
        """Blocks that no sequence refers to and that can be found again, over all groups, by tier:
        `device`, `host`."""
        return {}

    @property
    def num_total(self) -> int:
        """Blocks there are to hand out, over all groups."""


CONTRACT = "0.2"
