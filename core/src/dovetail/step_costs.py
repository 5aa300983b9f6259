"""What a step costs by its number of tokens: measured once, on the engine itself, before it serves."""

from __future__ import annotations

import secrets
import statistics
import time
from collections.abc import Callable

from dovetail.adaptive import Curve, EverySequence, StepCosts
from dovetail.engine import Engine
from dovetail.errors import PluginError
from dovetail.interfaces.drafter import Drafter
from dovetail.kv_cache import blocks_per_sequence
from dovetail.sequence import Sequence
from dovetail.speculation import Speculation
from dovetail.types import EngineStats, Request, SamplingParams

MAX_SECONDS = 2.0
"""For all measurements, but at least two steps of one token."""
MAX_TOKENS = 512
"""Of a step that is measured: beyond that, steps cost in proportion."""
ROWS = 1, 4, 16, 64
"""Sequences of steps that are measured with a draft in them and without."""
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
    engine: Engine, num_draft_tokens: int, *, max_num_seqs: int, max_num_batched_tokens: int, max_len: int,
    drafter: Drafter | None = None, clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:  # fmt: skip
    """Run steps of 1, 2, 4, … tokens: sequences of next to no context, each with as many drafts as it may have.

    `drafter`: one that runs in the worker, whose work is then part of the steps. The engine serves nobody yet; its stats begin
    anew. Raises `PluginError` if a step fails.
    """
    speculation, until = engine.speculation, clock() + MAX_SECONDS
    most = max(0, min(num_draft_tokens, max_len - 2))
    max_num_seqs = min(max_num_seqs, engine.max_num_waiting)
    limit = min(MAX_TOKENS, max_num_batched_tokens, max_num_seqs * (1 + most))
    length = min(max_len, 2 + (NUM_STEPS + 1) * (1 + most))
    by_tokens, plain, touched = Measured(), Measured(), Measured()

    def step(num_seqs: int, policy: _Always | None) -> float:
        engine.speculation = None if policy is None else Speculation(drafter or _Guess(), max(1, most), policy)
        return _seconds_of_a_step(engine, num_seqs, length, clock)

    try:
        for _ in range(2):  # what disturbs does so for a while, and the least that was seen counts
            for num_tokens in (2**i for i in range(limit.bit_length())):
                num_seqs = -(-num_tokens // (1 + most))
                num_drafts = num_tokens // num_seqs - 1
                if by_tokens and (clock() > until or not _has_room(engine, num_seqs, length, max_num_batched_tokens)):
                    break
                by_tokens.add(num_seqs * (1 + num_drafts), step(num_seqs, _Always(num_drafts) if num_drafts else None))
            for num_seqs in ROWS:
                if most and num_seqs <= max_num_seqs and num_seqs < max_num_batched_tokens and clock() < until and _has_room(
                    engine, num_seqs, length, max_num_batched_tokens
                ):  # fmt: skip
                    plain.add(num_seqs, step(num_seqs, None))
                    touched.add(num_seqs, step(num_seqs, _Always(1, first_alone=True)))
    finally:
        engine.speculation = speculation
        engine.stats = EngineStats(kv_blocks_total=engine.kv.num_total)
    curve = Curve(by_tokens)
    extra = {n: max(0.0, touched[n] - plain[n] - curve(n + 1) + curve(n)) for n in plain}
    return StepCosts(curve, Curve(extra or {1: 0.0}))


class Measured(dict[int, float]):
    """The least seconds seen, by number."""

    def add(self, number: int, seconds: float) -> None:
        self[number] = min(seconds, self.get(number, seconds))


def _has_room(engine: Engine, num_seqs: int, length: int, chunk: int) -> bool:
    """Sequences that are preempted would not show what a step costs."""
    kv = engine.kv
    needed = [num_seqs * blocks_per_sequence(group, length, chunk) for group in kv.groups]
    return all(count < there for count, there in zip(needed, kv.num_blocks, strict=True))


def _seconds_of_a_step(engine: Engine, num_seqs: int, length: int, clock: Callable[[], float]) -> float:
    """The median of a few steps in which sequences decode."""
    params = SamplingParams(temperature=0, max_tokens=length - 1, ignore_eos=True)
    salt = secrets.token_hex(16)  # nobody finds what is computed here
    for i in range(num_seqs):
        engine.add(Request(f"{salt}-{i}", [0], params, length - 1, 0, [], cache_salt=salt))
    began = clock()
    seconds, last, num_steps = list[float](), began, engine.stats.num_steps
    while len(engine.sequences) == num_seqs and len(seconds) <= NUM_STEPS and (
        len(seconds) < 3 or clock() < began + MAX_SECONDS / 10
    ):  # fmt: skip
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
