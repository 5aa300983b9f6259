"""Measure what a step costs by its number of tokens: once, on the engine itself, before it
serves."""

from __future__ import annotations

import secrets
import statistics
from collections.abc import Callable

from dovetail.engine.adaptive import Curve, EverySequence, StepCosts
from dovetail.engine.block_pool import blocks_per_sequence
from dovetail.engine.engine import Engine
from dovetail.engine.speculation import Speculation
from dovetail.errors import PluginError
from dovetail.interfaces.clock import Clock
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import Request, SamplingParams

MAX_SECONDS = 2.0
"""Time limit for all measurements; at least two steps of one token are always measured."""
MAX_TOKENS = 512
"""Maximum number of tokens in a measured step; beyond that, cost is proportional."""
ROWS = 1, 4, 16, 64
"""Numbers of sequences measured with draft tokens. Without draft tokens, twice as many are also
measured."""
NUM_STEPS = 6
NewEngine = Callable[[Speculation | None], Engine]


class _ConstantDrafter:
    """A drafter that always proposes the same token."""

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return [0] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


class _FixedPolicy(EverySequence):
    """A policy that gives each sequence `num_drafts` draft tokens, or the first sequence one and
    the others none."""

    def __init__(self, num_drafts: int, first_alone: bool = False) -> None:
        self._num_drafts, self._first_alone = num_drafts, first_alone

    def share(self, drafted: list[Sequence], lengths: list[int], num_seqs: int) -> list[int]:
        if self._first_alone:
            return [1] + [0] * (len(lengths) - 1)
        return [min(length, self._num_drafts) for length in lengths]


def measure(
    new_engine: NewEngine,
    num_draft_tokens: int,
    clock: Clock,
    *,
    max_num_seqs: int,
    max_num_batched_tokens: int,
    max_len: int,
    drafter: Drafter | None = None,
) -> StepCosts:
    """Measure steps of 1, 4, 16, … sequences with a minimal context: without draft tokens, with one
    in total, and with 1, 2, 4, … per sequence.

    `new_engine` returns a new engine over the components to measure, which are not serving yet and
    are idle again afterwards. `drafter` is one that runs in the worker, whose work is then part of
    the steps. Raises `PluginError` if a step fails.
    """
    until, idle = clock.now() + MAX_SECONDS, new_engine(None)
    most = max(0, min(num_draft_tokens, max_len - 2))
    limit = min(MAX_TOKENS, max_num_batched_tokens)
    max_num_seqs = min(max_num_seqs, idle.max_num_waiting, limit)
    length = min(max_len, 2 + (NUM_STEPS + 1) * (1 + most))
    plain = Measured()
    drafted = {n: Measured() for n in ROWS if most and n <= max_num_seqs and n < limit}

    def step(num_seqs: int, policy: _FixedPolicy | None) -> float:
        speculation = (
            None
            if policy is None
            else Speculation(drafter or _ConstantDrafter(), max(1, most), policy, clock)
        )
        return _seconds_of_a_step(new_engine(speculation), num_seqs, length, clock)

    # Cheapest first: when the time limit is reached, more expensive steps are extrapolated.
    runs: list[tuple[int, int, int]] = [
        (n, n, 0) for n in sorted({*ROWS, *(2 * n for n in ROWS)}) if n <= max_num_seqs
    ]
    for n in drafted:
        per_seq = {2**i for i in range(most.bit_length())} | {most}
        runs += [(n + 1, n, -1), *((n * (1 + k), n, k) for k in per_seq if n * (1 + k) <= limit)]
    for _ in range(2):  # disturbances are temporary, so the minimum of two passes counts
        for _, num_seqs, num_drafts in sorted(runs):
            if plain and (
                clock.now() > until or not _fits(idle.kv, num_seqs, length, max_num_batched_tokens)
            ):
                break
            if num_drafts == 0:
                plain.add(num_seqs, step(num_seqs, None))
            elif num_drafts < 0:  # one draft token in total
                drafted[num_seqs].add(1, step(num_seqs, _FixedPolicy(1, first_alone=True)))
            else:
                drafted[num_seqs].add(
                    num_seqs * num_drafts, step(num_seqs, _FixedPolicy(num_drafts))
                )
    return StepCosts(Curve(plain), {n: Curve(points) for n, points in drafted.items() if points})


class Measured(dict[int, float]):
    """The minimum of the seconds measured, by number."""

    def add(self, number: int, seconds: float) -> None:
        self[number] = min(seconds, self.get(number, seconds))


def _fits(kv: KVCacheManager, num_seqs: int, length: int, chunk: int) -> bool:
    """Return whether the sequences fit into the KV cache: preemption would distort the costs."""
    needed = [num_seqs * blocks_per_sequence(group, length, chunk) for group in kv.groups]
    return all(count < have for count, have in zip(needed, kv.num_blocks, strict=True))


def _seconds_of_a_step(engine: Engine, num_seqs: int, length: int, clock: Clock) -> float:
    """Return the median time of a few decode steps."""
    params = SamplingParams(temperature=0, max_tokens=length - 1, ignore_eos=True)
    salt = secrets.token_hex(16)  # no request can reuse this KV
    for i in range(num_seqs):
        engine.add(Request(f"{salt}-{i}", [0], params, length - 1, 0, [], cache_salt=salt))
    began = clock.now()
    seconds, last, num_steps = list[float](), began, engine.stats.num_steps
    while (
        len(engine.sequences) == num_seqs
        and len(seconds) <= NUM_STEPS
        and (len(seconds) < 3 or clock.now() < began + MAX_SECONDS / 10)
    ):
        _step(engine)
        if engine.stats.num_steps > num_steps:
            now, num_steps = clock.now(), engine.stats.num_steps
            seconds.append(now - last)
            last = now
    for request_id in list(engine.requests):
        engine.abort(request_id)
    while engine.has_work:
        _step(engine)
    return statistics.median(seconds[2:] or seconds)  # the first two include prefill


def _step(engine: Engine) -> None:
    for output in engine.step():
        if output.error is not None:
            raise PluginError(f"a step failed while its cost was measured: {output.error[1]}")
