"""Which tokens run now. Plain Python, no tensor, one object an engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dovetail.sequence import Sequence
from dovetail.types import StepPlan


@dataclass(frozen=True)
class SchedulerCapabilities:
    """What a scheduler promises beyond the contract, as data."""

    order: Literal["arrival", "priority"] | None = None
    """Requests that wait together begin in order of arrival, or of `priority` (lower first) and
    then arrival. None: no promise, but that nobody starves."""


class Scheduler(Protocol):
    """Holds the sequences that are not finished and picks each step's tokens.

    Within every plan: at most `max_num_batched_tokens` tokens and `max_num_seqs` running sequences;
    every sequence that is never finished is eventually scheduled.
    """

    waiting: list[Sequence]
    """Not running, in the order they will start: new ones, and preempted ones that must be computed
    again."""
    running: list[Sequence]
    """Holding blocks."""
    num_preemptions: int
    """So far."""

    def add(self, seq: Sequence) -> None:
        """Take in a new sequence."""

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        """Choose the next step's tokens, give their sequences blocks, and put a row for each into
        the plan.

        Who runs, and how many of its `num_to_compute` tokens, is the scheduler's to say;
        `KVCacheManager.grow` gives room for them and `Sequence.add_row` writes the row. A sequence
        that starts may find the beginning of its prompt computed: `KVCacheManager.reuse`. One whose
        blocks are taken begins anew: `Sequence.restart`.

        None: nothing can run now. With a step `in_flight` nothing may be preempted; then None also
        means "ask again when that step has been committed".
        """

    def remove(self, seq: Sequence) -> None:
        """Forget a finished sequence and free its blocks. Only called when no step in flight holds
        it."""
