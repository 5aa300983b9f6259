"""Select the tokens of each step. There is no prefill or decode phase: a sequence has known and
computed tokens, and each step computes some tokens of every scheduled sequence, so that the
computed tokens catch up with the known ones.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import StepPlan

if TYPE_CHECKING:
    from my_plugin import MyPluginOptions


class MyPluginScheduler:
    """A `Scheduler`; one object per engine."""

    def __init__(self, kv: KVCacheManager, options: MyPluginOptions) -> None:
        self.kv = kv
        self.options = options
        self.waiting: list[Sequence] = []
        self.running: list[Sequence] = []
        self.num_preemptions = 0
        self._step_id = 0
        self._released: list[int] = []
        """Sequences to release on the worker with the next plan."""

    def add(self, seq: Sequence) -> None:
        self.waiting.append(seq)

    def remove(self, seq: Sequence) -> None:
        (self.running if seq in self.running else self.waiting).remove(seq)
        self._release(seq)

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        plan = StepPlan(self._step_id, [], [], [], [], [])
        budget, lacks_blocks = self.options.max_num_batched_tokens, False
        for seq in self.running:  # oldest first; preemption removes sequences from the end
            count = min(seq.num_to_compute, budget)
            if count == 0 or seq.finish_reason is not None:
                continue
            while not self._add_row(plan, seq, count):
                lacks_blocks = True
                # A step in flight may read any block, so none can be taken away now. The engine
                # asks again when the step has ended.
                if in_flight or self._preempt_newest() is seq:
                    break
            else:
                budget -= count
        # A preempted sequence must not get its blocks back at once, unless no other can run.
        if not lacks_blocks or not (plan.seq_ids or in_flight):
            self._admit(plan, budget)
        if not plan.seq_ids:
            return None
        plan.released, self._released = self._released, []
        self._step_id += 1
        return plan

    def _admit(self, plan: StepPlan, budget: int) -> None:
        """Start waiting sequences in order of arrival, while batch size, tokens and blocks
        allow."""
        for seq in list(self.waiting):
            if not budget or len(self.running) == self.options.max_num_seqs:
                return
            if (
                seq.request.params.prompt_logprobs is None
            ):  # otherwise the whole prompt must be computed
                found = self.kv.reuse(seq, len(seq.tokens) - 1, may_wait=True)
                if found is None:
                    continue  # a running sequence is computing its next block
                seq.num_computed_tokens = found
            count = min(seq.num_to_compute, budget)
            if not self._add_row(plan, seq, count):
                self.kv.free(seq.seq_id)  # the blocks that `reuse` found
                seq.restart()
                return
            self.waiting.remove(seq)
            self.running.append(seq)
            budget -= count

    def _add_row(self, plan: StepPlan, seq: Sequence, count: int) -> bool:
        """Allocate blocks for the sequence's next `count` tokens and add a row. Return False, with
        nothing changed, if there are not enough blocks."""
        added = self.kv.grow(seq.seq_id, seq.num_computed_tokens + count)
        if added is None:
            return False
        seq.add_row(plan, count, added, self.kv.block_ids(seq.seq_id))
        return True

    def _preempt_newest(self) -> Sequence:
        """Free the blocks of the last running sequence. It is computed again later, with the same
        output."""
        seq = self.running.pop()
        self._release(seq)
        seq.restart()
        self.waiting.insert(0, seq)
        self.num_preemptions += 1
        return seq

    def _release(self, seq: Sequence) -> None:
        self.kv.free(seq.seq_id)
        if seq.on_worker:
            self._released.append(seq.seq_id)
            seq.on_worker = False
