"""What a step costs by its number of tokens: measured once, on the engine itself, before it
serves."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable

from dovetail.engine.adaptive import Curve, EverySequence, StepCosts
from dovetail.engine.engine import Engine
from dovetail.engine.kv_sizes import blocks_per_sequence
from dovetail.engine.speculation import Speculation
from dovetail.errors import PluginError
from dovetail.interfaces.drafter import Drafter
from dovetail.sequence import Sequence
from dovetail.types import EngineStats, Request, SamplingParams

MAX_SECONDS = 2.0
"""For all measurements, but at least two steps of one token."""
MAX_TOKENS = 512
"""Of a step that is measured: beyond that, steps cost in proportion."""
ROWS = 1, 4, 16, 64
"""Sequences of steps that are measured with drafts in them; without also twice as many of each."""
NUM_STEPS = 6


class _Guess:
    """Proposes the same token always."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return [0] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


class _Always(EverySequence):
    """In each step `num_drafts` drafts for each sequence, or one for the first alone."""

    def __init__(self, num_drafts: int, first_alone: bool = False) -> None:
        self._num_drafts, self._first_alone = num_drafts, first_alone

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        if self._first_alone:
            return [1] + [0] * (len(lengths) - 1)
        return [min(length, self._num_drafts) for length in lengths]


def measure(
    engine: Engine,
    num_draft_tokens: int,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_len: int,
    drafter: Drafter | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:
    """Run steps of 1, 2, 4, … sequences of next to no context, without drafts and with one, and 1,
    2, 4, … for each.

    `drafter`: one that runs in the worker, whose work is then part of the steps. The engine serves
    nobody yet; its stats begin anew. Raises `PluginError` if a step fails.
    """
    speculation, until = engine.speculation, clock() + MAX_SECONDS
    most = max(0, min(num_draft_tokens, max_len - 2))
    limit = min(MAX_TOKENS, max_num_batched_tokens)
    max_num_seqs = min(max_num_seqs, engine.max_num_waiting, limit)
    length = min(max_len, 2 + (NUM_STEPS + 1) * (1 + most))
    plain, drafted = (
        Measured(),
        {n: Measured() for n in ROWS if most and n <= max_num_seqs and n < limit},
    )

    def step(num_seqs: int, policy: _Always | None) -> float:
        engine.speculation = (
            None if policy is None else Speculation(drafter or _Guess(), max(1, most), policy)
        )
        return _seconds_of_a_step(engine, num_seqs, length, clock)

    # What costs least comes first: where the time ends, what would cost more is taken in
    # proportion.
    todo: list[tuple[int, int, int]] = [
        (n, n, 0) for n in sorted({*ROWS, *(2 * n for n in ROWS)}) if n <= max_num_seqs
    ]
    for n in drafted:
        of_each = {2**i for i in range(most.bit_length())} | {most}
        todo += [(n + 1, n, -1), *((n * (1 + k), n, k) for k in of_each if n * (1 + k) <= limit)]
    try:
        for _ in range(2):  # what disturbs does so for a while, and the least that was seen counts
            for _, num_seqs, num_drafts in sorted(todo):
                if plain and (
                    clock() > until
                    or not _has_room(engine, num_seqs, length, max_num_batched_tokens)
                ):
                    break
                if num_drafts == 0:
                    plain.add(num_seqs, step(num_seqs, None))
                elif num_drafts < 0:  # one draft in all
                    drafted[num_seqs].add(1, step(num_seqs, _Always(1, first_alone=True)))
                else:
                    drafted[num_seqs].add(
                        num_seqs * num_drafts, step(num_seqs, _Always(num_drafts))
                    )
    finally:
        engine.speculation = speculation
        engine.stats = EngineStats(kv_blocks_total=engine.kv.num_total)
    return StepCosts(Curve(plain), {n: Curve(points) for n, points in drafted.items() if points})


class Measured(dict[int, float]):
    """The least seconds seen, by number."""

    def add(self, number: int, seconds: float) -> None:
        self[number] = min(seconds, self.get(number, seconds))


def _has_room(engine: Engine, num_seqs: int, length: int, chunk: int) -> bool:
    """Sequences that are preempted would not show what a step costs."""
    kv = engine.kv
    needed = [num_seqs * blocks_per_sequence(group, length, chunk) for group in kv.groups]
    return all(count < there for count, there in zip(needed, kv.num_blocks, strict=True))


def _seconds_of_a_step(
    engine: Engine, num_seqs: int, length: int, clock: Callable[[], float]
) -> float:
    """The median of a few steps in which sequences decode."""
    params = SamplingParams(temperature=0, max_tokens=length - 1, ignore_eos=True)
    salt = secrets.token_hex(16)  # nobody finds what is computed here
    for i in range(num_seqs):
        engine.add(Request(f"{salt}-{i}", [0], params, length - 1, 0, [], cache_salt=salt))
    began = clock()
    seconds, last, num_steps = list[float](), began, engine.stats.num_steps
    while (
        len(engine.sequences) == num_seqs
        and len(seconds) <= NUM_STEPS
        and (len(seconds) < 3 or clock() < began + MAX_SECONDS / 10)
    ):
        _step(engine)
        if engine.stats.num_steps > num_steps:
            now, num_steps = clock(), engine.stats.num_steps
            seconds.append(now - last)
            last = now
    for request_id in list(engine.requests):
        engine.abort(request_id)
    while engine.has_work:
        _step(engine)
    return statistics.median(seconds[2:] or seconds)  # the first two are those in which they begin


def _step(engine: Engine) -> None:
    for output in engine.step():
        if output.error is not None:
            raise PluginError(f"a step failed while its cost was measured: {output.error[1]}")
