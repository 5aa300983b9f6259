"""Define the scheduler, which decides which tokens run in each step. It is plain Python without
tensors; there is one object per engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, Protocol

from dovetail.sequence import Sequence
from dovetail.types import StepPlan


@dataclass(frozen=True)
class SchedulerCapabilities:
    """Guarantees of a scheduler beyond the contract, as data."""

    order: Literal["arrival", "priority"] | None = None
    """Order in which requests that wait together start: by arrival, or by `priority` (lower first)
    and then arrival. None: no guarantee except that no request starves."""


class Scheduler(Protocol):
    """Holds the unfinished sequences and selects the tokens of each step.

    Every plan has at most `max_num_batched_tokens` tokens, and at most `max_num_seqs` sequences
    run. Every unfinished sequence is scheduled eventually.
    """

    waiting: list[Sequence]
    """Sequences that are not running, in the order in which they will start: new ones, and
    preempted ones that must be computed again."""
    running: list[Sequence]
    """Sequences that hold blocks."""
    num_preemptions: int
    """Number of preemptions so far."""

    def add(self, seq: Sequence) -> None:
        """Add a new sequence."""

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        """Select the tokens of the next step, allocate blocks for their sequences, and add a row to
        the plan for each sequence.

        The scheduler decides which sequences run and how many of their `num_to_compute` tokens;
        `KVCacheManager.grow` allocates slots for them and `Sequence.add_row` adds the row. When a
        sequence starts, `KVCacheManager.reuse` may find the KV of its first tokens. When its blocks
        are taken away, `Sequence.restart` resets it.

        Returns None if nothing can run now. While a step is `in_flight` no sequence may be
        preempted; then None also means "ask again when that step has been committed".
        """

    def remove(self, seq: Sequence) -> None:
        """Remove a finished sequence and free its blocks. Called only when no step in flight
        contains it."""
