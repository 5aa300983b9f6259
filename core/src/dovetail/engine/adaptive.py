"""Who is drafted for, and how far: as far as it pays.

A step costs seconds by its sequences and draft tokens (measured at the start, `step_costs.py`), and
a draft token is accepted with a probability that its sequence has shown so far. So what a number of
draft tokens is expected to bring, in tokens per second of the whole step, can be computed, and the
best one is taken; often that is none.

An account bounds what it costs to find out. It earns a share of the time that passes, and what
accepted drafts have saved; it pays for looking, for steps that were longer because of drafts, and
for pauses of the overlapped loop. While it is empty nobody is asked but those whose last drafts
were right, and new ones while most are: where drafts do not help, the loss is that share. A
sequence whose drafter finds nothing, or errs, rests for a number of steps that doubles each time.
"""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Items
from dataclasses import dataclass, field

from dovetail.sequence import Sequence

SHARE = 0.003
"""Of the time, for finding out."""
MAX_EARNED = 0.5
"""Steps of one token: what the account holds at most of that share, so that idle hours do not pay
for errors."""
START = 8.0
"""Steps of one token: what the account begins with."""
MAX_SAVED = 16.0
"""Steps of one token: what it holds at most of what accepted drafts have saved."""
MAX_REST = 32
"""Steps."""
WORTH = 1.1
"""Tokens per second that drafts must be expected to bring, times those without: the costs are not
known better than that."""
SAMPLED = 16
"""Of so many steps without drafts, one is compared with what it was expected to take; of those with
drafts, every one."""
MAX_SLOWER, LEARNS, FORGETS = 3.0, 0.05, 0.02
"""How much one comparison counts at most, how fast that is learned, and, where nobody drafts,
forgotten."""
MAX_OVERRUN = 4.0
"""Times what a step was expected to take: what the account pays at most where a draft model read
prompts in it."""
MEMORY = 0.9
"""Of the past, at each verification: about the last ten count."""
DECAY = 0.5
"""Of a sequence's past, at each rest: it is tried again, and by then it may say something else."""
NONE: list[Sequence] = []
FURTHER = 0.95
"""How likely the next position's draft is thought to be accepted, times that of the one before,
where nothing is known."""


class Curve:
    """Seconds by a number, never falling: interpolated between points, proportional beyond them."""

    def __init__(self, points: dict[int, float]) -> None:
        """`points`: at least one."""
        self._at = sorted(points)
        # More work never takes less time. Where a measurement says so, that of the smaller work was
        # disturbed.
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
    """Seconds of a step."""

    plain: Curve
    """By number of sequences, each of which gets its next token."""
    drafted: Mapping[int, Curve] = field(default_factory=dict)
    """By number of sequences: by number of draft tokens. More than what the tokens cost: such a
    step is not overlapped, rows are put together and taken apart in a slower way, and a drafter in
    the worker is part of it. Empty: `plain`, by tokens."""

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
    """What became of a sequence's drafts, by position, and when it is asked again."""

    seq: Sequence
    due: int = 0
    """Step."""
    rest: int = 0
    """Steps, of the last rest."""
    is_right: bool = False
    """Most of its last drafts were accepted."""
    tried: list[float] = field(default_factory=list)
    """Drafts verified at this position with all before them accepted; the past counts less."""
    accepted: list[float] = field(default_factory=list)

    def chances(self, count: int) -> list[float]:
        """For positions 0, 1, …: that a draft there is accepted, with all before it. Never
        rising."""
        chances, of_all, of_this = [], 1.0, 1.0
        for i in range(count):
            if i < len(self.tried):
                of_this = (self.accepted[i] + of_this) / (self.tried[i] + 1)
            of_all *= of_this
            chances.append(of_all)
            of_this *= FURTHER
        return chances

    def note(self, num_drafted: int, num_accepted: int) -> None:
        self.is_right = 2 * num_accepted > num_drafted
        self.fade(MEMORY)
        missing = min(num_drafted, num_accepted + 1) - len(self.tried)
        self.tried += [0.0] * missing
        self.accepted += [0.0] * missing
        for i in range(min(num_drafted, num_accepted + 1)):
            self.tried[i] += 1
            self.accepted[i] += i < num_accepted

    def fade(self, factor: float) -> None:
        self.tried = [n * factor for n in self.tried]
        self.accepted = [n * factor for n in self.accepted]


def best_counts(
    chances: Items[Items[float]], num_seqs: int, costs: StepCosts, slower: float = 1.0
) -> list[int]:
    """How many drafts each sequence should get, for the most tokens per second of a step of
    `num_seqs` sequences.

    `chances`: by sequence, of its first, second, … draft, never rising; so the best n drafts of all
    are the n likeliest. `slower`: how many times as long steps with drafts have taken lately as
    `costs` says, beside steps without.
    """
    ranked = sorted(
        ((-chance, i) for i, of_seq in enumerate(chances) for chance in of_seq),
        key=lambda one: one[0],
    )
    best, taken, gained = num_seqs / costs.without(num_seqs), 0, 0.0
    for n, (minus, _) in enumerate(ranked, 1):
        gained -= minus
        rate = (num_seqs + gained) / (costs.with_drafts(num_seqs, n) * slower)
        if rate > best:
            best, taken = rate, n
    counts = [0] * len(chances)
    for _, i in ranked[:taken]:
        counts[i] += 1
    return counts


class EverySequence:
    """The plain policy: everybody is asked in every step, for as many drafts as there is room
    for."""

    def due(self, running: list[Sequence]) -> list[Sequence]:
        """Whom to ask now, in one call before each step. For each of them `on_proposed` follows."""
        return running

    def on_proposed(self, seq: Sequence, has_drafts: bool, seconds: float) -> None:
        """It was asked, and has something to propose or not."""

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        """How many of its drafts each of those that have some may have verified in a step of
        `num_seqs` sequences."""
        return lengths

    def verified(self, seq: Sequence, num_drafted: int, num_accepted: int) -> None:
        """What became of them. 0 of 0: it decodes, and may not be known yet."""

    def forget(self, seq_id: int) -> None:
        """The sequence has ended."""


class Adaptive(EverySequence):
    """As many drafts as pay, by `costs`, for each sequence in each step."""

    def __init__(
        self,
        costs: StepCosts,
        num_draft_tokens: int,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self.costs = costs
        self._num_draft_tokens = num_draft_tokens
        self._clock = clock
        self._earned_until = clock()
        self._max_earned, self._max_saved = (
            MAX_EARNED * costs.without(1),
            MAX_SAVED * costs.without(1),
        )
        self.budget = START * costs.without(1)
        """Seconds."""
        self._look = 0.0
        """Seconds of asking for one sequence, on average."""
        self._gains: dict[int, float] = {}
        """By number of sequences: tokens per second with perfect drafts, times those without."""
        self._slower = [1.0, 1.0]
        """Of steps without drafts, and with: seconds over those that `costs` says, on average."""
        self._began, self._expected, self._has_drafts, self._reads_prompts = 0.0, 0.0, False, False
        """The step that is compared, if anything is expected of it."""
        self._histories: dict[int, History] = {}
        self._ready: dict[int, History] = {}
        """Due, and not asked yet."""
        self._hot: dict[int, History] = {}
        """Those that are asked whatever the account holds."""
        self._poor_until = 0
        """Step before which the account holds nothing."""
        self._share_right = 0.0
        """Of the last verifications, of all sequences: a new one is thought to be like most."""
        self._due_at: dict[int, list[int]] = {}
        """By step: sequences. One that has ended, or is due at another time by now, is left here
        and passed over."""
        self._step = self._num_seqs = 0

    def due(self, running: list[Sequence]) -> list[Sequence]:
        # Where nobody is asked, this is all that drafting costs a step: its cost must not depend on
        # the sequences.
        self._step += 1
        if not running:
            self._expected = (
                0.0  # it was the last step of all, and nobody knows how long ago it ended
            )
        elif self._expected:
            self._compare()
        elif not self._step % SAMPLED:
            self._expect(self.costs.without(len(running)), False)
        if self._step in self._due_at:
            for seq_id in self._due_at.pop(self._step):
                history = self._histories.get(seq_id)
                if history is not None and history.due == self._step:
                    (self._hot if history.is_right else self._ready)[seq_id] = history
        if not (self._hot or (self._ready and self._step >= self._poor_until)):
            return NONE
        if not running or not self._can_pay(len(running)):
            return NONE
        due = [history.seq for history in self._hot.values()]
        self._hot.clear()
        if self._ready and self._step >= self._poor_until:
            due += [
                self._ready.pop(seq_id).seq
                for seq_id in list(self._ready)[: self._num_affordable(len(running))]
            ]
        return due

    def _num_affordable(self, num_seqs: int) -> int:
        """How many of those that are ready can be asked."""
        now = self._clock()
        earned = min(self._max_earned, self.budget + SHARE * (now - self._earned_until))
        self._earned_until, self.budget = now, max(self.budget, earned)
        if self.budget < 0:
            self._poor_until = self._step + int(
                -self.budget / (SHARE * self.costs.without(num_seqs))
            )
            return 0
        return (
            len(self._ready)
            if self.budget > self._look * len(self._ready)
            else 1 + int(self.budget / self._look)
        )

    def _compare(self) -> None:
        """The step that ends here with what it was expected to take. Prompts and pauses make some
        steps longer, and are few."""
        expected, seconds = self._expected, self._clock() - self._began
        self._expected = 0.0
        if self._reads_prompts:
            self.budget -= min(max(0.0, seconds - expected), MAX_OVERRUN * expected)
            return
        ratio = min(MAX_SLOWER, max(1 / MAX_SLOWER, seconds / expected))
        self._slower[self._has_drafts] += LEARNS * (ratio - self._slower[self._has_drafts])
        if not self._has_drafts:  # what it is with drafts is not known for ever
            self._slower[1] += FORGETS * (self._slower[0] - self._slower[1])

    def _expect(self, seconds: float, has_drafts: bool, reads_prompts: bool = False) -> None:
        self._began, self._expected = self._clock(), seconds
        self._has_drafts, self._reads_prompts = has_drafts, reads_prompts

    def _can_pay(self, num_seqs: int) -> bool:
        """Whether drafts would pay at this batch size if all of them were accepted."""
        gain = self._gains.get(num_seqs)
        if gain is None:
            without, most = (
                num_seqs / self.costs.without(num_seqs),
                num_seqs * self._num_draft_tokens,
            )
            counts = {
                1,
                most,
                *(num_seqs * 2**i for i in range(self._num_draft_tokens.bit_length())),
            }
            gain = (
                max((num_seqs + n) / self.costs.with_drafts(num_seqs, n) for n in counts) / without
            )
            self._gains[num_seqs] = gain
        return gain > WORTH * self._drafts_slow_down()

    def _drafts_slow_down(self) -> float:
        """How many times more than `costs` says a step with drafts takes, beside one without. Where
        only the latter have been seen, and are slow, those with drafts will be too."""
        return max(1.0, self._slower[1] / self._slower[0])

    def on_proposed(self, seq: Sequence, has_drafts: bool, seconds: float) -> None:
        self._look += 0.1 * (seconds - self._look)
        self.budget -= seconds
        history = self._of(seq)
        if has_drafts:
            self._wake(history, 1)
        else:
            self._rest(history)

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        began = self._clock()
        self._num_seqs = num_seqs
        histories = [self._of(seq) for seq in drafted]
        chances = [
            history.chances(length) for history, length in zip(histories, lengths, strict=True)
        ]
        slower = self._drafts_slow_down()
        counts = best_counts(chances, num_seqs, self.costs, WORTH * slower)
        for history, count in zip(histories, counts, strict=True):
            if not count:
                self._rest(history)
        self.budget -= self._clock() - began
        if any(counts):
            seconds = self.costs.with_drafts(num_seqs, sum(counts))
            # A draft model reads a sequence's prompt when it is first asked: that says nothing of
            # the steps to come.
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
            self._wake(self._of(seq), 1)
        if history is None or not num_drafted:
            return
        history.note(num_drafted, num_accepted)
        self._share_right += (1 - MEMORY) * (history.is_right - self._share_right)
        saved = num_accepted * self.costs.without(self._num_seqs) / self._num_seqs
        self.budget = max(self.budget, min(self._max_saved, self.budget + saved))
        if self.budget > 0:
            self._poor_until = 0
        if num_accepted:
            history.rest = 0
        else:
            self._rest(history)

    def forget(self, seq_id: int) -> None:
        self._histories.pop(seq_id, None)
        self._ready.pop(seq_id, None)
        self._hot.pop(seq_id, None)

    def _of(self, seq: Sequence) -> History:
        history = self._histories.get(seq.seq_id)
        if history is None:
            history = self._histories[seq.seq_id] = History(seq, is_right=self._share_right > 0.5)
        return history

    def _rest(self, history: History) -> None:
        """Not in the next steps, and twice as long each time."""
        history.is_right = False
        history.fade(DECAY)
        self._wake(history, 1 + history.rest)
        history.rest = min(MAX_REST, 2 * history.rest or 1)

    def _wake(self, history: History, steps: int) -> None:
        history.due = self._step + steps
        self._due_at.setdefault(history.due, []).append(history.seq.seq_id)
