"""Select the tokens of each step.

There is no prefill phase and no decode phase. A sequence has `num_computed_tokens` and a number of
known tokens, and each step computes some tokens of every scheduled sequence, so that the first
number catches up with the second. Chunked prefill, decode, prefix reuse, verification of draft
tokens and resumption after preemption are all this one rule.

Running sequences are scheduled first, in order. Waiting sequences are then admitted while the token
budget, the sequence limit and free blocks allow. If there are not enough blocks for a running
sequence, the last running sequence is preempted and computed again later. Its output tokens are
part of its known tokens by then, so preemption does not change outputs.
"""

from __future__ import annotations

import math
from bisect import insort
from collections.abc import Callable

from dovetail.engine.decode import add_decode_rows
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

Order = Callable[[Sequence], tuple[float, ...]]


def fcfs(seq: Sequence) -> tuple[float, ...]:
    """Return the key for first come, first served: `seq_id` counts up."""
    return (seq.seq_id,)


def priority(seq: Sequence) -> tuple[float, ...]:
    """Return the key for lower `priority` first, then first come, first served."""
    return (seq.request.priority, seq.seq_id)


class TokenBudgetScheduler:
    """The built-in `Scheduler`, for any total order of sequences."""

    def __init__(
        self, kv: KVCacheManager, order: Order, *, max_num_seqs: int, max_num_batched_tokens: int
    ) -> None:
        self.kv = kv
        self.order = order
        self.max_num_seqs = max_num_seqs
        self.max_num_batched_tokens = max_num_batched_tokens
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._preemption_due = False
        self._step_id = 0
        self._released: list[int] = []
        # Blocks are allocated whole, so in every group the number of slots of a sequence is a
        # multiple of this number.
        self._slots_unit = math.gcd(*(g.block_size for g in kv.groups))

    def add(self, seq: Sequence) -> None:
        insort(self.waiting, seq, key=self.order)

    def remove(self, seq: Sequence) -> None:
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._evict(seq)

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        if in_flight and self._preemption_due:
            return None
        self._preemption_due = False
        plan = StepPlan(self._step_id, [], [], [], [], [])
        budget, has_blocks = self._continue(plan, in_flight)
        if self.waiting and (has_blocks or not (plan.seq_ids or in_flight)):
            self._admit(plan, budget)
        if not plan.seq_ids:
            return None
        plan.released, self._released = self._released, []
        self._step_id += 1
        return plan

    def _continue(self, plan: StepPlan, in_flight: bool) -> tuple[int, bool]:
        """Add rows for the running sequences. Returns the remaining token budget, and whether there
        were enough blocks for all of them."""
        budget, has_blocks = self.max_num_batched_tokens, True
        running = iter(self.running)  # preemption removes sequences from the end of this list
        while True:
            num_rows = len(plan.seq_ids)
            seq = add_decode_rows(running, plan, budget)
            budget -= len(plan.seq_ids) - num_rows
            if seq is None:
                return budget, has_blocks
            count = min(seq.num_to_compute, budget)
            if count <= 0 or seq.finish_reason is not None:
                continue
            added = self._grow(seq, count)
            # Draft tokens are dropped rather than preempting another sequence for them.
            if added is None and seq.draft_token_ids:
                count, added = 1, self._grow(seq, 1)
            while added is None:
                has_blocks = False
                if in_flight:
                    self._preemption_due = True
                    return budget, has_blocks
                # Preempt the last running sequence, which may be this one. Those before this one
                # already have their rows.
                last = self.running[-1]
                self._preempt(last)
                if last is seq:
                    return budget, has_blocks
                added = self._grow(seq, count)
            seq.add_row(plan, count, added, self.kv.block_ids(seq.seq_id))
            budget -= count

    def _grow(self, seq: Sequence, count: int) -> list[list[int]] | None:
        """Allocate blocks for the next `count` tokens; see `KVCacheManager.grow`."""
        end = seq.num_computed_tokens + count
        added = self.kv.grow(seq.seq_id, end)
        if added is not None:
            seq.num_slots = -(-end // self._slots_unit) * self._slots_unit
        return added

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting sequences in order while token budget, batch size and free blocks allow."""
        for seq in self._queue():
            if budget <= 0 or len(self.running) >= self.max_num_seqs:
                break
            source = self._sibling(seq)
            if source is not None:
                if source.num_computed_tokens < source.num_prompt_tokens:
                    continue  # its prompt is being computed; the next step can share it
                # The last known token is always computed again, because its logits are needed.
                shareable = min(seq.num_prompt_tokens, len(seq.tokens) - 1)
                seq.num_computed_tokens = self.kv.share(source.seq_id, seq.seq_id, shareable)
            if not seq.num_computed_tokens and seq.request.params.prompt_logprobs is None:
                found = self.kv.reuse(seq, len(seq.tokens) - 1, may_wait=True)
                if found is None:
                    continue  # blocks that it needs are being computed
                seq.num_computed_tokens = found
            count = min(seq.num_to_compute, budget)
            added = self._grow(seq, count)
            if added is None:
                self.kv.free(seq.seq_id)
                seq.num_computed_tokens = 0
                break
            self.waiting.remove(seq)
            insort(self.running, seq, key=self.order)
            seq.add_row(plan, count, added, self.kv.block_ids(seq.seq_id))
            budget -= count

    def _queue(self) -> list[Sequence]:
        """Return the waiting sequences in the order in which to try them."""
        return list(self.waiting)

    def _sibling(self, seq: Sequence) -> Sequence | None:
        """Return a running sample of the same request that has computed, or will compute, the whole
        prompt."""
        if len(seq.siblings) < 2 or seq.request.params.prompt_logprobs is not None:
            return None
        return next(
            (s for s in seq.siblings if s is not seq and s.on_worker and s.finish_reason is None),
            None,
        )

    def _preempt(self, seq: Sequence) -> None:
        self.running.remove(seq)
        self._evict(seq)
        seq.restart()
        insort(self.waiting, seq, key=self.order)
        self.num_preemptions += 1

    def _evict(self, seq: Sequence) -> None:
        self.kv.free(seq.seq_id)
        seq.num_slots = 0
        if seq.on_worker:
            self._released.append(seq.seq_id)
            seq.on_worker = False
