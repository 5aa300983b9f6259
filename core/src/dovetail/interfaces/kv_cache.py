"""Define the KV-cache manager, which owns the free lists and reference counts of blocks. It is
plain Python without tensors; there is one object per engine."""

from __future__ import annotations

from typing import Protocol

from dovetail.sequence import Sequence
from dovetail.types import BlockOp, EngineStats, KVGroup


class KVCacheManager(Protocol):
    """Allocates blocks of every KV group to sequences. Block 0 of a group is the null block, which
    is never allocated.

    A manager without a prefix cache may inherit the methods that concern one.
    """

    groups: list[KVGroup]
    num_blocks: list[int]
    """Number of blocks per group, the null block included."""

    faults: list[tuple[int, Exception]]
    """Requests that must fail: the seq_id of one of their sequences, and the exception. The engine
    removes the entries."""

    block_ops: list[BlockOp]
    """Copies to execute, in this order, before the kernels of the next step. The engine removes the
    entries."""

    def grow(self, seq_id: int, num_tokens: int) -> list[list[int]] | None:
        """Allocate slots for the first `num_tokens` tokens of a sequence.

        Returns the blocks added, per group, in order (mostly empty lists), or None if there are not
        enough free blocks; then nothing has changed. Slots stay allocated until `free`; `trim` may
        take back some of them.
        """

    def share(self, source: int, target: int, num_tokens: int) -> int:
        """Let a new sequence `target` use the blocks that hold the first tokens of `source`, at
        most `num_tokens` of them.

        Only whole blocks are shared, so no sequence ever writes to a shared block. Returns the
        number of tokens shared; if it is 0, `target` is still unknown to the manager.
        """

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        """Let a new sequence use cached blocks that hold the KV of its first tokens, at most
        `num_tokens` of them.

        Returns the number of tokens found; if it is 0, the sequence is still unknown to the
        manager. A manager without a prefix cache finds nothing.

        Returns None, only if `may_wait` is set, while a running sequence is about to compute the
        next block that this sequence needs. Nothing has changed then: ask again in the next step,
        and continue with the next sequence meanwhile. A sequence that is waited for holds blocks,
        so there are no chains of waiting sequences.
        """
        return 0

    def num_cached(self, seq: Sequence, num_tokens: int) -> int:
        """Return how many of the first `num_tokens` tokens of a waiting sequence `reuse` would find
        now. Changes nothing."""
        return 0

    def reset_prefix_cache(self) -> None:
        """Forget everything cached so far. Running sequences keep their blocks."""
        return None

    def computed(self, seq: Sequence, num_tokens: int) -> None:
        """Record that the KV of the first `num_tokens` tokens of a sequence is in its blocks. Other
        sequences may then reuse it: prompt blocks at once, output blocks when the sequence leaves.

        Called after a step that computed these tokens has succeeded. Individual steps may be
        skipped. Unknown sequence ids are ignored.
        """
        return None

    def block_ids(self, seq_id: int) -> list[list[int]]:
        """Return the block tables of a sequence, per group. A trimmed entry is the null block."""

    def trim(self, seq_id: int, num_computed_tokens: int) -> None:
        """Take back the blocks that no later token can attend to (sliding windows). Call it only
        when no step in flight reads them."""

    def free(self, seq_id: int) -> None:
        """Drop a sequence's references, if it has any. Call it only when no step in flight uses
        them."""

    @property
    def num_used(self) -> int:
        """Number of blocks that sequences reference, over all groups."""

    def count(self, stats: EngineStats) -> None:
        """Set the fields of the stats that concern the prefix cache (`num_prefix_*`)."""
        return None

    @property
    def num_total(self) -> int:
        """Number of blocks that can be allocated, over all groups."""


CONTRACT = "0.2"
