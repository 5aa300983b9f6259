"""What a step costs by its number of tokens: measured once, on the engine itself, before it serves."""

from __future__ import annotations

import math
import secrets
import statistics
import time
from collections.abc import Callable

from dovetail.adaptive import EverySequence, StepCosts
from dovetail.engine import Engine, OverlappedEngine
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
NUM_STEPS = 6


class _Guess:
    """Proposes the same token always."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return [0] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


class _Always(EverySequence):
    """A number of drafts for each sequence in each step. With none, the loop still pauses as if there were some."""

    def __init__(self, num_drafts: int) -> None:
        self._num_drafts = num_drafts

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        return [min(length, self._num_drafts) for length in lengths]


def measure(
    engine: Engine, num_draft_tokens: int, *, max_num_seqs: int, max_num_batched_tokens: int, max_len: int,
    drafter: Drafter | None = None, clock: Callable[[], float] = time.perf_counter,
) -> StepCosts:  # fmt: skip
    """Run steps of 1, 2, 4, … tokens: sequences of next to no context, each with as many drafts as it may have.

    `drafter`: one that runs in the worker, whose work is then part of the steps. The engine serves nobody yet; its stats begin
    anew. Raises `PluginError` if a step fails.
    """
    speculation, began = engine.speculation, clock()
    most = max(0, min(num_draft_tokens, max_len - 2))
    limit = min(MAX_TOKENS, max_num_batched_tokens, min(max_num_seqs, engine.max_num_waiting) * (1 + most))
    length = min(max_len, 2 + (NUM_STEPS + 1) * (1 + most))
    points: dict[int, float] = {}
    overlapped = math.inf  # seconds of a step of one token in the overlapped loop
    sizes = [2**i for i in range(limit.bit_length())]
    try:
        for num_tokens in (*sizes, *sizes):  # twice, since whatever disturbs does so for a while
            num_seqs = -(-num_tokens // (1 + most))
            num_drafts = num_tokens // num_seqs - 1
            if points and (clock() > began + MAX_SECONDS or not _has_room(engine, num_seqs, length, max_num_batched_tokens)):
                continue
            if num_tokens == 1 and isinstance(engine, OverlappedEngine):
                engine.speculation = None
                overlapped = min(overlapped, _seconds_of_a_step(engine, 1, length, clock))
            engine.speculation = Speculation(drafter or _Guess(), max(1, num_drafts), _Always(num_drafts))
            size, seconds = num_seqs * (1 + num_drafts), _seconds_of_a_step(engine, num_seqs, length, clock)
            points[size] = min(seconds, points.get(size, math.inf))
    finally:
        engine.speculation = speculation
        engine.stats = EngineStats(kv_blocks_total=engine.kv.num_total)
    return StepCosts(points, max(0.0, StepCosts(points)(1) - overlapped))


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
