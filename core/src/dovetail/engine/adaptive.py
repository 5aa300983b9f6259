"""Decide which sequences get draft tokens and how many, so that drafting increases throughput.

The duration of a step depends on its sequences and draft tokens (measured at the start,
`step_costs.py`), and a draft token is accepted with a probability that is estimated from its
sequence's history. From these follows the expected throughput of a step, in tokens per second, for
any number of draft tokens. The number with the highest throughput is used, which is often 0.

A token-bucket budget bounds the cost of trying. It earns a share of the elapsed time and the time
that accepted draft tokens have saved. It is charged for calls of the drafter, for steps that took
longer because of draft tokens, and for pauses of the overlapped loop. While it is empty, the
drafter is called only for hot sequences, whose last draft tokens were mostly accepted, and for new
ones while most sequences are hot. Where drafting does not help, the loss is limited to that share.
A sequence for which the drafter proposes nothing, or nothing that is accepted, is skipped for a
number of steps that doubles each time.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from dovetail.interfaces.clock import Clock
from dovetail.sequence import Sequence

SHARE = 0.003
"""Share of the elapsed time that may be spent on trying."""
MAX_EARNED = 0.5
"""Maximum budget from elapsed time, in steps of one token, so that idle hours do not pay for
errors."""
START = 8.0
"""Initial budget, in steps of one token."""
MAX_SAVED = 16.0
"""Maximum budget from time that accepted draft tokens have saved, in steps of one token."""
MAX_REST = 32
"""Maximum number of steps for which a sequence is skipped."""
MIN_SPEEDUP = 1.1
"""Minimum expected speedup for which draft tokens are used; the costs are not known more
precisely."""
SAMPLED = 16
"""One in this many steps without draft tokens is compared with its expected duration; of those with
draft tokens, every step is."""
MAX_SLOWDOWN, LEARNING_RATE, FORGETTING_RATE = 3.0, 0.05, 0.02
"""Limit of one comparison; rate at which a slowdown is learned; rate at which it is forgotten while
there are no draft tokens."""
MAX_OVERRUN = 4.0
"""Maximum charge for a step in which a draft model read prompts, as a multiple of the step's
expected duration."""
MEMORY = 0.9
"""Decay of a sequence's history at each verification: about the last ten count."""
DECAY = 0.5
"""Decay of a sequence's history each time it is skipped, because its output may have changed by the
time it is tried again."""
NO_SEQUENCES: list[Sequence] = []
POSITION_DECAY = 0.95
"""Estimated ratio of the acceptance probabilities of successive positions, if nothing is
known."""


class Curve:
    """Seconds by a number, nondecreasing: interpolated between measured points, proportional beyond
    them."""

    def __init__(self, points: dict[int, float]) -> None:
        """Create a curve from at least one point."""
        self._at = sorted(points)
        # More work never takes less time. Where it was measured so, the measurement of the smaller
        # work was disturbed.
        self._seconds = [min(points[n] for n in self._at[i:]) for i in range(len(self._at))]
        self.points = dict(zip(self._at, self._seconds, strict=True))

    def __call__(self, number: float) -> float:
        i = bisect_left(self._at, number)
        if i == len(self._at):
            return self._seconds[-1] * number / self._at[-1]
        if i == 0 or self._at[i] == number:
            return self._seconds[i]
        (left, right), (low, high) = self._at[i - 1 : i + 1], self._seconds[i - 1 : i + 1]
        return low + (high - low) * (number - left) / (right - left)


@dataclass(frozen=True)
class StepCosts:
    """Duration of a step in seconds."""

    plain: Curve
    """Seconds by number of sequences, each of which computes its next token."""
    drafted: Mapping[int, Curve] = field(default_factory=dict)
    """Seconds by number of sequences and number of draft tokens. This is more than the cost of the
    tokens: such a step is not overlapped, assembling and splitting its rows is slower, and it
    includes a drafter that runs in the worker. If empty, `plain` is used, by number of tokens."""

    def without(self, num_seqs: int) -> float:
        return self.plain(num_seqs)

    def with_drafts(self, num_seqs: int, num_drafts: int) -> float:
        if not self.drafted:
            return self.plain(num_seqs + num_drafts)
        known = sorted(self.drafted)
        low = max((n for n in known if n <= num_seqs), default=known[0])
        high = min((n for n in known if n >= num_seqs), default=low)
        ends = [self.drafted[n](max(1.0, num_drafts * n / num_seqs)) for n in (low, high)]
        beyond, between = ends[0] * num_seqs / low, (num_seqs - low) / max(1, high - low)
        return max(
            beyond if low == high else ends[0] + (ends[1] - ends[0]) * between, self.plain(num_seqs)
        )


@dataclass(slots=True)
class History:
    """Acceptance history of a sequence's draft tokens by position, and when it is tried again."""

    seq: Sequence
    due: int = 0
    """Step in which the drafter may be called for it again."""
    rest: int = 0
    """Number of steps for which it was last skipped."""
    is_hot: bool = False
    """True if most of its last draft tokens were accepted."""
    tried: list[float] = field(default_factory=list)
    """Draft tokens verified at this position after all before them were accepted, with decay."""
    accepted: list[float] = field(default_factory=list)
    """Draft tokens accepted at this position, with decay."""

    def chances(self, count: int) -> list[float]:
        """Return, for positions 0, 1, …, the probability that a draft token there and all before it
        are accepted. Never increases."""
        chances, of_all, of_this = [], 1.0, 1.0
        for i in range(count):
            if i < len(self.tried):
                of_this = (self.accepted[i] + of_this) / (self.tried[i] + 1)
            of_all *= of_this
            chances.append(of_all)
            of_this *= POSITION_DECAY
        return chances

    def note(self, num_drafted: int, num_accepted: int) -> None:
        self.is_hot = 2 * num_accepted > num_drafted
        self.decay(MEMORY)
        missing = min(num_drafted, num_accepted + 1) - len(self.tried)
        self.tried += [0.0] * missing
        self.accepted += [0.0] * missing
        for i in range(min(num_drafted, num_accepted + 1)):
            self.tried[i] += 1
            self.accepted[i] += i < num_accepted

    def decay(self, factor: float) -> None:
        self.tried = [n * factor for n in self.tried]
        self.accepted = [n * factor for n in self.accepted]


def best_counts(
    chances: Items[Items[float]], num_seqs: int, costs: StepCosts, slower: float = 1.0
) -> list[int]:
    """Return how many draft tokens each sequence should get, for the highest throughput of a step
    of `num_seqs` sequences.

    Args:
        chances: probability of acceptance, by sequence, of its first, second, … draft token. It
            never increases, so the best n draft tokens are the n most likely ones.
        slower: recent slowdown of steps with draft tokens relative to `costs`, compared with steps
            without.
    """
    ranked = sorted(
        ((-chance, i) for i, of_seq in enumerate(chances) for chance in of_seq),
        key=lambda one: one[0],
    )
    best, num_used, gained = num_seqs / costs.without(num_seqs), 0, 0.0
    for n, (minus, _) in enumerate(ranked, 1):
        gained -= minus
        rate = (num_seqs + gained) / (costs.with_drafts(num_seqs, n) * slower)
        if rate > best:
            best, num_used = rate, n
    counts = [0] * len(chances)
    for _, i in ranked[:num_used]:
        counts[i] += 1
    return counts


class EverySequence:
    """The plain policy: in every step, call the drafter for every sequence, and use as many draft
    tokens as possible."""

    def due(self, running: list[Sequence]) -> list[Sequence]:
        """Return the sequences for which to call the drafter now. Called once before each step; a
        call of `on_proposed` follows for each sequence."""
        return running

    def on_proposed(self, seq: Sequence, has_drafts: bool, seconds: float) -> None:
        """Record that the drafter was called, and whether it proposed anything."""

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        """Return how many draft tokens of each sequence with proposals to verify in a step of
        `num_seqs` sequences."""
        return lengths

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """Record how many draft tokens were accepted. 0 of 0 means that the sequence decodes
        without; it may be new."""

    def forget(self, seq_id: int) -> None:
        """Remove a sequence that has ended."""


class Adaptive(EverySequence):
    """The policy that uses as many draft tokens as increase throughput, according to `costs`."""

    def __init__(
        self,
        costs: StepCosts,
        num_draft_tokens: int,
        clock: Clock,
    ) -> None:
        self.costs = costs
        self._num_draft_tokens = num_draft_tokens
        self._clock = clock.now
        self._earned_until = clock.now()
        self._max_earned = MAX_EARNED * costs.without(1)
        self._max_saved = MAX_SAVED * costs.without(1)
        self.budget = START * costs.without(1)
        """Token-bucket budget in seconds."""
        self._propose_seconds = 0.0
        """Average seconds of a drafter call for one sequence."""
        self._max_speedups: dict[int, float] = {}
        """Speedup if all draft tokens were accepted, by number of sequences."""
        self._slowdowns = [1.0, 1.0]
        """Average of measured over expected seconds, for steps without and with draft tokens."""
        self._began, self._expected, self._has_drafts, self._reads_prompts = 0.0, 0.0, False, False
        """The step that is being timed; not timed if `_expected` is 0."""
        self._histories: dict[int, History] = {}
        self._ready: dict[int, History] = {}
        """Sequences whose skip period is over and for which the drafter has not been called."""
        self._hot: dict[int, History] = {}
        """Hot sequences, for which the drafter is called even if the budget is empty."""
        self._no_budget_until = 0
        """Step before which the budget is empty."""
        self._share_hot = 0.0
        """Share of recent verifications with hot sequences; a new sequence is hot if most are."""
        self._due_at: dict[int, list[int]] = {}
        """Sequences by the step in which they are due. Entries for sequences that have ended, or
        are due at another time by now, are ignored."""
        self._step = self._num_seqs = 0

    def due(self, running: list[Sequence]) -> list[Sequence]:
        # If nothing is due, this is all that drafting costs a step, so its cost must not depend on
        # the number of sequences.
        self._step += 1
        if not running:
            self._expected = 0.0  # the last step has ended at an unknown time
        elif self._expected:
            self._compare()
        elif not self._step % SAMPLED:
            self._expect(self.costs.without(len(running)), False)
        if self._step in self._due_at:
            for seq_id in self._due_at.pop(self._step):
                history = self._histories.get(seq_id)
                if history is not None and history.due == self._step:
                    (self._hot if history.is_hot else self._ready)[seq_id] = history
        if not (self._hot or (self._ready and self._step >= self._no_budget_until)):
            return NO_SEQUENCES
        if not running or not self._can_speed_up(len(running)):
            return NO_SEQUENCES
        due = [history.seq for history in self._hot.values()]
        self._hot.clear()
        if self._ready and self._step >= self._no_budget_until:
            due += [
                self._ready.pop(seq_id).seq
                for seq_id in list(self._ready)[: self._num_affordable(len(running))]
            ]
        return due

    def _num_affordable(self, num_seqs: int) -> int:
        """Return for how many of the ready sequences the budget allows a drafter call."""
        now = self._clock()
        earned = min(self._max_earned, self.budget + SHARE * (now - self._earned_until))
        self._earned_until, self.budget = now, max(self.budget, earned)
        if self.budget < 0:
            self._no_budget_until = self._step + int(
                -self.budget / (SHARE * self.costs.without(num_seqs))
            )
            return 0
        return (
            len(self._ready)
            if self.budget > self._propose_seconds * len(self._ready)
            else 1 + int(self.budget / self._propose_seconds)
        )

    def _compare(self) -> None:
        """Compare the step that ends here with its expected duration. Some steps are longer because
        of prompts and pauses, but few."""
        expected, seconds = self._expected, self._clock() - self._began
        self._expected = 0.0
        if self._reads_prompts:
            self.budget -= min(max(0.0, seconds - expected), MAX_OVERRUN * expected)
            return
        ratio = min(MAX_SLOWDOWN, max(1 / MAX_SLOWDOWN, seconds / expected))
        slowdowns = self._slowdowns
        slowdowns[self._has_drafts] += LEARNING_RATE * (ratio - slowdowns[self._has_drafts])
        if not self._has_drafts:  # forget an old slowdown of steps with draft tokens
            slowdowns[1] += FORGETTING_RATE * (slowdowns[0] - slowdowns[1])

    def _expect(self, seconds: float, has_drafts: bool, reads_prompts: bool = False) -> None:
        self._began, self._expected = self._clock(), seconds
        self._has_drafts, self._reads_prompts = has_drafts, reads_prompts

    def _can_speed_up(self, num_seqs: int) -> bool:
        """Return whether drafting would pay at this batch size if all draft tokens were
        accepted."""
        speedup = self._max_speedups.get(num_seqs)
        if speedup is None:
            without, most = (
                num_seqs / self.costs.without(num_seqs),
                num_seqs * self._num_draft_tokens,
            )
            counts = {
                1,
                most,
                *(num_seqs * 2**i for i in range(self._num_draft_tokens.bit_length())),
            }
            speedup = (
                max((num_seqs + n) / self.costs.with_drafts(num_seqs, n) for n in counts) / without
            )
            self._max_speedups[num_seqs] = speedup
        return speedup > MIN_SPEEDUP * self._draft_slowdown()

    def _draft_slowdown(self) -> float:
        """Return the slowdown of steps with draft tokens relative to `costs`, compared with steps
        without. If only the latter have been seen, and are slow, the former are assumed to be as
        slow."""
        return max(1.0, self._slowdowns[1] / self._slowdowns[0])

    def on_proposed(self, seq: Sequence, has_drafts: bool, seconds: float) -> None:
        self._propose_seconds += 0.1 * (seconds - self._propose_seconds)
        self.budget -= seconds
        history = self._history(seq)
        if has_drafts:
            self._schedule(history, 1)
        else:
            self._skip(history)

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        began = self._clock()
        self._num_seqs = num_seqs
        histories = [self._history(seq) for seq in drafted]
        chances = [
            history.chances(length) for history, length in zip(histories, lengths, strict=True)
        ]
        slower = self._draft_slowdown()
        counts = best_counts(chances, num_seqs, self.costs, MIN_SPEEDUP * slower)
        for history, count in zip(histories, counts, strict=True):
            if not count:
                self._skip(history)
        self.budget -= self._clock() - began
        if any(counts):
            seconds = self.costs.with_drafts(num_seqs, sum(counts))
            # A draft model reads a sequence's prompt when it is first called for it: such a step
            # says nothing about later steps.
            is_first = any(
                count and not history.tried
                for history, count in zip(histories, counts, strict=True)
            )
            self._expect(seconds, True, is_first)
            self.budget -= seconds * slower - self.costs.without(num_seqs)
        return counts

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        history = self._histories.get(seq.seq_id)
        if history is None:
            self._schedule(self._history(seq), 1)
        if history is None or not num_drafted:
            return
        history.note(num_drafted, num_accepted)
        self._share_hot += (1 - MEMORY) * (history.is_hot - self._share_hot)
        saved = num_accepted * self.costs.without(self._num_seqs) / self._num_seqs
        self.budget = max(self.budget, min(self._max_saved, self.budget + saved))
        if self.budget > 0:
            self._no_budget_until = 0
        if num_accepted:
            history.rest = 0
        else:
            self._skip(history)

    def forget(self, seq_id: int) -> None:
        self._histories.pop(seq_id, None)
        self._ready.pop(seq_id, None)
        self._hot.pop(seq_id, None)

    def _history(self, seq: Sequence) -> History:
        history = self._histories.get(seq.seq_id)
        if history is None:
            history = self._histories[seq.seq_id] = History(seq, is_hot=self._share_hot > 0.5)
        return history

    def _skip(self, history: History) -> None:
        """Skip the sequence in the next steps, twice as many each time."""
        history.is_hot = False
        history.decay(DECAY)
        self._schedule(history, 1 + history.rest)
        history.rest = min(MAX_REST, 2 * history.rest or 1)

    def _schedule(self, history: History, steps: int) -> None:
        history.due = self._step + steps
        self._due_at.setdefault(history.due, []).append(history.seq.seq_id)
