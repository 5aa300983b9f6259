"""Mistakes that schedulers make, over the core's own."""

from __future__ import annotations

from dovetail.assembly.builtins import dovetail_schedulers
from dovetail.engine.scheduler import TokenBudgetScheduler, fcfs
from dovetail.interfaces.scheduler import SchedulerCapabilities
from dovetail.plugin.provider import SchedulerOptions
from sabotage import Sabotages

SABOTAGES = Sabotages("scheduler", dovetail_schedulers()[0])
ADDS_UP, SAME, STARVES, ORDER, TIGHT = (
    "test_block_accounting_invariant_holds",
    "test_scheduling_changes_no_output",
    "test_nobody_starves_while_others_keep_coming",
    "test_declared_order",
    "test_tight_memory_changes_no_output",
)


def sabotage(*caught_by, order=fcfs, can=None):
    def note(cls):
        def build(context, options):
            limits = {k: getattr(options, k) for k in SchedulerOptions.model_fields}
            return cls(context.kv, order, **limits)

        return SABOTAGES.add(cls, caught_by, build=build, capabilities=can)

    return note


@sabotage(ADDS_UP, SAME)
class BudgetExceeded(TokenBudgetScheduler):
    """A step has a token more than the budget."""

    def schedule(self, *, in_flight):
        self.max_num_batched_tokens += 1
        try:
            return super().schedule(in_flight=in_flight)
        finally:
            self.max_num_batched_tokens -= 1


@sabotage(ADDS_UP)
class BatchRowsExceeded(TokenBudgetScheduler):
    """One sequence more than there are batch rows is admitted."""

    def _admit(self, plan, budget):
        self.max_num_seqs += 1
        super()._admit(plan, budget)
        self.max_num_seqs -= 1


@sabotage(STARVES, order=lambda seq: (-seq.seq_id,))
class LastComeFirst(TokenBudgetScheduler):
    """The last one that came is first."""


@sabotage(STARVES, order=lambda seq: (seq.max_len, seq.seq_id))
class ShortestWithoutAgeing(TokenBudgetScheduler):
    """The shortest is first, for ever: a long one waits as long as shorter ones come."""


@sabotage(ADDS_UP)
class LeaksOnAbort(TokenBudgetScheduler):
    """The blocks of an aborted sequence are not freed."""

    def remove(self, seq):
        if seq.finish_reason == "abort":
            (self.running if seq in self.running else self.waiting).remove(seq)
            self._released += [seq.seq_id] * seq.on_worker
        else:
            super().remove(seq)


@sabotage(ADDS_UP)
class PreemptsInFlight(TokenBudgetScheduler):
    """A sequence is preempted while a step that holds it is in flight."""

    def schedule(self, *, in_flight):
        return super().schedule(in_flight=False)


@sabotage(ADDS_UP)
class ForgetsThatItIsPreempted(TokenBudgetScheduler):
    """A preempted sequence goes on where it was, though its blocks are gone."""

    def _preempt(self, seq):
        computed = seq.num_computed_tokens
        super()._preempt(seq)
        seq.num_computed_tokens = computed


@sabotage(ADDS_UP)
class TellsNoRelease(TokenBudgetScheduler):
    """The worker is never told that a sequence has ended."""

    def _evict(self, seq):
        self.kv.free(seq.seq_id)
        seq.num_slots = 0
        seq.on_worker = False


@sabotage(TIGHT, STARVES)
class LosesThePreempted(TokenBudgetScheduler):
    """A preempted sequence is put in no list."""

    def _preempt(self, seq):
        super()._preempt(seq)
        self.waiting.remove(seq)


class RowsChanged(TokenBudgetScheduler):
    """`change` is called for every row of a plan that does not sample."""

    def schedule(self, *, in_flight):
        plan = super().schedule(in_flight=in_flight)
        if plan is not None:
            running = {s.seq_id: s for s in self.running}
            for row, seq_id in enumerate(plan.seq_ids):
                if not plan.samples[row]:
                    self.change(plan, row, running[seq_id])
        return plan


@sabotage(ADDS_UP, SAME)
class SamplesTooEarly(RowsChanged):
    """Every row samples, also a chunk that does not reach its sequence's end."""

    def change(self, plan, row, seq):
        if seq.num_tokens < seq.max_len:
            plan.samples[row] = True
            seq.num_in_flight += 1


@sabotage(ADDS_UP)
class RepeatsAToken(RowsChanged):
    """The last computed token of a chunk is computed again by the next."""

    def change(self, plan, row, seq):
        if seq.num_computed_tokens > 1:
            seq.num_computed_tokens -= 1


@sabotage(
    ORDER,
    order=lambda seq: (-seq.request.priority, seq.seq_id),
    can=SchedulerCapabilities("priority"),
)
class PriorityReversed(TokenBudgetScheduler):
    """Priority is declared, and higher numbers run first."""


@sabotage(
    ORDER,
    order=lambda seq: (len(seq.tokens) % 2, -seq.seq_id),
    can=SchedulerCapabilities("arrival"),
)
class OrderThatLies(TokenBudgetScheduler):
    """Order of arrival is declared, and the last one runs first."""


@sabotage("test_a_failed_step_is_forgotten", ADDS_UP)
class KeepsTheEnded(TokenBudgetScheduler):
    """A sequence that has ended stays in the list of those that run."""

    def remove(self, seq):
        running = list(self.running)
        super().remove(seq)
        self.running = running


@sabotage("test_declaration", can=("arrival",))
class ForeignCapabilities(TokenBudgetScheduler):
    """The capabilities are another extension point's."""


@sabotage("test_shared_beginnings_change_no_output")
class DropsWhoeverWaits(TokenBudgetScheduler):
    """A sequence that has to wait for another one's blocks is left out of the list of those that
    wait."""

    def _admit(self, plan, budget):
        super()._admit(plan, budget)
        if self.running and any(
            self.kv.reuse(s, len(s.tokens) - 1, may_wait=True) is None for s in self.waiting[:1]
        ):
            self.waiting.pop(0)


@sabotage("test_shared_beginnings_change_no_output")
class KeepsWhatItFound(TokenBudgetScheduler):
    """A sequence that finds no room keeps the blocks that were found for it."""

    def _admit(self, plan, budget):
        free, self.kv.free = self.kv.free, lambda seq_id: None
        try:
            super()._admit(plan, budget)
        finally:
            self.kv.free = free
