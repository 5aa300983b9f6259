"""Waiting sequences by how much of them is cached: what is there is used before it is given up.

The order alone would let a sequence of which nothing is cached wait for ever. So whoever has been
overtaken by `max_overtaken` later ones goes first from the next step on: whatever comes, fewer than
`max_overtaken + max_num_seqs` later ones begin before it (those aside that begin while it waits for
blocks that one that runs is computing).
"""

from __future__ import annotations

from bisect import bisect

from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

LOOKAHEAD = 64
"""Sequences that are looked at: looking takes time in every step that admits, whoever is
admitted."""


class LongestPrefixScheduler(TokenBudgetScheduler):
    """First come, first served, but that of the first `LOOKAHEAD` in line the one of the longest
    cached prefix is next."""

    def __init__(
        self,
        kv: KVCacheManager,
        max_overtaken: int,
        *,
        max_num_seqs: int,
        max_num_batched_tokens: int,
    ) -> None:
        super().__init__(
            kv, fcfs, max_num_seqs=max_num_seqs, max_num_batched_tokens=max_num_batched_tokens
        )
        self._max_overtaken = max_overtaken
        self._num_overtaken: dict[int, int] = {}
        """By waiting sequence: later ones that have begun."""

    def remove(self, seq: Sequence) -> None:
        self._num_overtaken.pop(seq.seq_id, None)
        super().remove(seq)

    def _admit(self, plan: StepPlan, budget: int) -> None:
        before = {s.seq_id for s in self.running}
        super()._admit(plan, budget)
        begun = sorted(s.seq_id for s in self.running if s.seq_id not in before)
        for seq_id in begun:
            self._num_overtaken.pop(seq_id, None)
        if begun:
            for seq in self.waiting:
                if later := len(begun) - bisect(begun, seq.seq_id):
                    self._num_overtaken[seq.seq_id] = self._num_overtaken.get(seq.seq_id, 0) + later

    def _queue(self) -> list[Sequence]:
        near, far = self.waiting[:LOOKAHEAD], self.waiting[LOOKAHEAD:]
        return sorted(near, key=self._place) + far

    def _place(self, seq: Sequence) -> tuple[int, int, int]:
        if self._num_overtaken.get(seq.seq_id, 0) >= self._max_overtaken:
            return 0, 0, seq.seq_id
        return 1, -self.kv.num_cached(seq, len(seq.tokens) - 1), seq.seq_id
