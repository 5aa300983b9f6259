"""How many tokens are drafted, and for whom: as many as pay, and what finding out costs is
bounded."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.adaptive import (
    MAX_REST,
    SHARE,
    START,
    Adaptive,
    Curve,
    EverySequence,
    StepCosts,
    best_counts,
)
from dovetail.engine.engine import Engine, OverlappedEngine
from dovetail.engine.step_costs import NewEngine, measure
from dovetail.errors import PluginError
from dovetail.sequence import Sequence
from dovetail.types import Request, SamplingParams
from dovetail_testing.clock import VirtualClock
from dovetail_testing.engines import (
    MAX_LEN,
    EngineMachine,
    Outputs,
    Parts,
    Setup,
    alone,
    collect,
    request,
    requests_of,
    run,
    setups,
    workloads,
)
from dovetail_testing.machines import run_machine
from dovetail_testing.prefix_cache import new_paged, new_scheduler
from dovetail_testing.scheduler import Knowing
from dovetail_testing.simulated import Faults

FLAT = StepCosts(Curve({1: 1.0, 1000: 1.1}))
"""As if tokens cost nothing: every draft is worth it."""
LINEAR = StepCosts(Curve({1: 1.0}))
"""As if only tokens cost: no draft is."""

curves = st.lists(st.floats(0, 3), max_size=5).map(
    lambda rest: Curve({2**i: s for i, s in enumerate(itertools.accumulate([1.0, *rest]))})
)
costs = st.builds(StepCosts, curves, st.dictionaries(st.integers(1, 6), curves, max_size=3))
falling = st.lists(st.floats(0, 1), max_size=4).map(lambda values: sorted(values, reverse=True))


def rate(counts: Any, chances: list[list[float]], num_seqs: int, of: StepCosts) -> float:
    """Tokens per second that are expected."""
    gained = sum(sum(of_seq[:n]) for n, of_seq in zip(counts, chances, strict=True))
    seconds = of.with_drafts(num_seqs, sum(counts)) if any(counts) else of.without(num_seqs)
    return (num_seqs + gained) / seconds


@given(st.lists(falling, max_size=3), st.integers(0, 5), costs)
def test_no_choice_of_counts_is_better(
    chances: list[list[float]], others: int, of: StepCosts
) -> None:
    num_seqs = max(1, len(chances) + others)
    counts = best_counts(chances, num_seqs, of)
    assert all(0 <= n <= len(of_seq) for n, of_seq in zip(counts, chances, strict=True))
    best = max(
        rate(every, chances, num_seqs, of)
        for every in itertools.product(*(range(len(c) + 1) for c in chances))
    )
    assert rate(counts, chances, num_seqs, of) == pytest.approx(best)
    assert rate(counts, chances, num_seqs, of) >= rate([0] * len(chances), chances, num_seqs, of)


@given(
    st.dictionaries(st.integers(1, 100), st.floats(0.1, 10), min_size=1),
    st.integers(1, 300),
    st.integers(1, 300),
)
def test_a_curve_never_falls_and_passes_below_its_points(
    points: dict[int, float], a: int, b: int
) -> None:
    curve = Curve(points)
    assert curve(min(a, b)) <= curve(max(a, b)) + 1e-9
    assert all(curve(n) <= seconds for n, seconds in points.items())
    assert curve(2 * max(points)) == pytest.approx(2 * curve(max(points)))


@given(costs, st.integers(1, 9), st.integers(1, 30), st.integers(1, 30))
def test_more_drafts_never_cost_less_and_any_cost_at_least_what_none_do(
    of: StepCosts, num_seqs: int, a: int, b: int
) -> None:
    few, many = of.with_drafts(num_seqs, min(a, b)), of.with_drafts(num_seqs, max(a, b))
    assert of.without(num_seqs) <= few + 1e-9
    assert few <= many + 1e-9


def test_costs_between_measured_numbers_of_sequences_are_between_theirs() -> None:
    of = StepCosts(
        Curve({1: 1.0, 4: 2.0}), {1: Curve({1: 2.0, 2: 3.0}), 4: Curve({1: 4.0, 4: 5.0, 8: 9.0})}
    )
    assert of.with_drafts(1, 2) == 3.0
    assert of.with_drafts(4, 4) == 5.0
    assert of.with_drafts(2, 2) == pytest.approx(2 + (5 - 2) / 3)  # one each: between 2 and 5
    assert of.with_drafts(8, 16) == 18.0
    assert of.with_drafts(4, 1) == 4.0


def sequence(seq_id: int) -> Sequence:
    return Sequence(seq_id, Request("r", [1], SamplingParams(), 99, 0, []), 0, [1, 2])


def policy_of(costs: StepCosts, clock: VirtualClock, *sequences: Sequence) -> Adaptive:
    policy = Adaptive(costs, 4, clock)
    for seq in sequences:
        policy.verified(seq, 0, 0)
    return policy


def looks(
    policy: Adaptive,
    clock: VirtualClock,
    running: list[Sequence],
    num_steps: int,
    answer: Callable[[int], int],
) -> list[int]:
    """Steps of a second each, in which one sequence is asked and has `answer(step)` of its four
    drafts accepted; -1: it has no drafts. Returns the steps in which it was asked."""
    asked = []
    for step in range(num_steps):
        clock.sleep(1)
        for seq in policy.due(running):
            asked.append(step)
            accepted = answer(step)
            policy.on_proposed(seq, accepted >= 0, 0.0)
            if accepted >= 0:
                (count,) = policy.share([seq], [4], len(running))
                policy.verified(seq, count, min(count, accepted))
    return asked


def test_who_finds_nothing_rests_twice_as_long_each_time_up_to_a_bound() -> None:
    seq, clock = sequence(0), VirtualClock()
    asked = looks(policy_of(FLAT, clock, seq), clock, [seq], 300, lambda step: -1)
    gaps = [b - a for a, b in itertools.pairwise(asked)]
    assert gaps[:7] == [1, 2, 3, 5, 9, 17, 33]
    assert set(gaps[6:]) == {MAX_REST + 1}


def test_who_errs_rests_and_who_is_right_again_is_asked_in_every_step() -> None:
    seq, clock = sequence(0), VirtualClock()
    asked = looks(
        policy_of(FLAT, clock, seq), clock, [seq], 400, lambda step: 0 if step < 60 else 4
    )
    assert 1 < sum(step < 60 for step in asked) < 12
    assert asked[-300:] == list(range(100, 400))


def test_where_perfect_drafts_would_not_pay_nobody_is_asked() -> None:
    seqs, clock = [sequence(i) for i in range(3)], VirtualClock()
    policy = policy_of(LINEAR, clock, *seqs)
    assert looks(policy, clock, seqs, 50, lambda step: 4) == []
    only_alone = policy_of(StepCosts(Curve({1: 1.0, 2: 1.0, 3: 3.0, 100: 100.0})), clock, *seqs)
    assert looks(only_alone, clock, seqs, 50, lambda step: 4) == []
    assert looks(only_alone, clock, seqs[:1], 50, lambda step: 4) != []


@given(st.lists(st.integers(-1, 0), min_size=1, max_size=50), st.floats(0.001, 0.2), costs)
def test_what_never_helps_costs_no_more_than_its_share(
    answers: list[int], look: float, of: StepCosts
) -> None:
    """By the account's own figures, over 2,000 steps: seconds of looking, and of drafts that were
    verified for nothing."""
    seq, clock = sequence(0), VirtualClock()
    policy = policy_of(of, clock, seq)
    spent = last = passed = 0.0
    for step in range(2000):
        clock.sleep(of.without(1))
        passed += of.without(1)
        for due in policy.due([seq]):
            last = look
            policy.on_proposed(due, answers[step % len(answers)] >= 0, look)
            if answers[step % len(answers)] >= 0:
                (count,) = policy.share([due], [4], 1)
                if count:
                    last += of.with_drafts(1, count) - of.without(1)
                    policy.verified(due, count, 0)
            spent += last
            clock.sleep(last)
            passed += last
    assert spent <= SHARE * passed + START * of.without(1) + last + 1e-6


def test_steps_that_take_longer_than_was_measured_are_believed() -> None:
    """Drafts that are always right, in steps three times as long as they should be: they stop, and
    are tried again in time."""
    seq, clock, drafted = sequence(0), VirtualClock(), list[int]()
    policy = policy_of(StepCosts(Curve({1: 1.0, 5: 2.0, 100: 40.0})), clock, seq)
    for step in range(3000):
        clock.sleep(1)
        for due in policy.due([seq]):
            policy.on_proposed(due, True, 0.0)
            (count,) = policy.share([due], [4], 1)
            policy.verified(due, count, count)
            if count:
                drafted.append(step)
                clock.sleep(5)
    assert 5 < len(drafted) < 300
    assert drafted[-1] > 1000


def test_time_in_which_nobody_runs_is_no_step() -> None:
    """Short sequences, one after the other, an hour between each two: their drafts, always right,
    are drafted to the end."""
    clock = VirtualClock()
    policy = policy_of(StepCosts(Curve({1: 1.0, 5: 3.8, 100: 80.0})), clock)
    for i in range(50):
        seq, num_drafted = sequence(i), 0
        policy.verified(seq, 0, 0)
        for _ in range(4):
            for due in policy.due([seq]):
                policy.on_proposed(due, True, 0.0)
                (count,) = policy.share([due], [4], 1)
                clock.sleep(policy.costs.with_drafts(1, count) if count else 1.0)
                policy.verified(due, count, count)
                num_drafted += count
        assert num_drafted > 8, f"sequence {i} had {num_drafted} drafts"
        policy.forget(i)
        clock.sleep(3600)
        policy.due([])


def test_where_all_steps_take_longer_than_was_measured_drafts_do_not_look_cheaper() -> None:
    """Steps without drafts take twice as long as they should; those with any would not have paid,
    and do not pay now."""
    seq, clock = sequence(0), VirtualClock()
    policy = policy_of(StepCosts(Curve({1: 1.0}), {1: Curve({1: 2.5, 3: 3.9, 4: 4.0})}), clock, seq)
    for _ in range(500):
        clock.sleep(2)
        for due in policy.due([seq]):
            policy.on_proposed(due, True, 0.0)
            assert policy.share([due], [2], 1) == [0]


def test_a_slow_drafter_is_asked_less() -> None:
    """One that takes a tenth of a step to say nothing."""
    seqs, clock = [sequence(i) for i in range(8)], VirtualClock()
    policy = policy_of(FLAT, clock, *seqs)
    num_asked = 0
    for _ in range(4000):
        clock.sleep(1)
        for seq in policy.due(seqs):
            num_asked += 1
            policy.on_proposed(seq, False, 0.1)
    assert 0 < num_asked <= (4000 * SHARE + START) / 0.1 + 8


def test_the_past_fades_and_nothing_is_left_of_a_sequence_that_has_ended() -> None:
    seq, clock = sequence(0), VirtualClock()
    policy = policy_of(FLAT, clock, seq)
    looks(policy, clock, [seq], 5, lambda step: 0)
    policy.forget(0)
    assert looks(policy, clock, [], 100, lambda step: 4) == []
    again, other = sequence(0), policy_of(FLAT, VirtualClock(), sequence(0))
    policy.verified(again, 0, 0)
    assert policy.share([again], [4], 1) == other.share([sequence(0)], [4], 1)


class Ticking(VirtualClock):
    """A clock by which a second passes between two looks at it."""

    def now(self) -> float:
        self.seconds += 1
        return self.seconds


def parts(expected: Outputs | None, costs: StepCosts, **values: Any) -> Parts:
    """With a drafter that knows what comes and errs at every third position, or one that repeats
    the last token."""
    drafter = Repeats if expected is None else partial(Knowing, expected)
    return Parts(
        new_paged,
        new_scheduler,
        drafter,
        policy=lambda: Adaptive(costs, 4, Ticking()),
        **values,
    )


class Repeats:
    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        return seq.tokens[-1:] * max_tokens

    def forget(self, seq_id: int) -> None:
        pass


@settings(deadline=None)
@given(
    setups,
    workloads,
    st.sampled_from(
        [FLAT, LINEAR, StepCosts(Curve({1: 1.0, 4: 1.2, 8: 3.0}), {2: Curve({1: 1.2})})]
    ),
)
def test_adapting_changes_no_output(setup: Setup, workload: list[Any], costs: StepCosts) -> None:
    asked = requests_of(workload)
    expected = alone(Parts(new_paged, new_scheduler), asked, setup.window)
    assert (
        run(parts(expected, costs).engine(setup), asked, [a.arrival for a in workload]) == expected
    )


def test_engines_that_adapt() -> None:
    """Requests come, run and are aborted at any moment, between draft and verification too."""
    seed = random.randrange(2**31)
    found = run_machine(partial(EngineMachine, parts(None, FLAT)), seed, examples=60, steps=40)
    assert found is None, (seed, found)


@pytest.mark.parametrize("overlap", [False, True])
def test_right_drafts_make_fewer_steps_and_are_counted(overlap: bool) -> None:
    asked = [request("r0", [1, 2, 3], 40, seed=5)]
    setup = Setup(budget=MAX_LEN, spare_blocks=50, overlap=overlap)
    expected = alone(Parts(new_paged, new_scheduler), asked)
    engine = parts(expected, FLAT).engine(setup)
    assert engine.speculation is not None
    engine.speculation._clock = Ticking()
    assert run(engine, asked) == expected
    stats, num_tokens = engine.snapshot(), len(expected["r0", 0])
    assert stats.num_steps < num_tokens * 0.6
    assert (
        stats.num_draft_tokens
        == sum(stats.drafted_by_position)
        > stats.num_accepted_tokens
        > num_tokens / 3
    )
    assert stats.num_accepted_tokens == sum(stats.accepted_by_position)
    assert all(
        a <= d for a, d in zip(stats.accepted_by_position, stats.drafted_by_position, strict=True)
    )
    assert stats.draft_seconds > 0


def test_the_overlapped_loop_pauses_only_for_drafts() -> None:
    """A drafter that never has any leaves every step overlapped."""
    engine = parts({("r0", 0): []}, FLAT).engine(
        Setup(budget=MAX_LEN, spare_blocks=50, overlap=True)
    )
    assert isinstance(engine, OverlappedEngine)
    engine.add(request("r0", [1, 2, 3], 30, seed=1))
    in_flight = []
    while engine.has_work:
        engine.step()
        in_flight.append(engine._in_flight is not None)
    assert all(in_flight[:-3])


class Faulty(Repeats):
    """Raises at the third call, and at every later one of a sequence of that request."""

    def __init__(self, draft: Any) -> None:
        self.draft, self.num_calls = draft, 0

    def propose(self, seq: Sequence, max_tokens: int) -> list[int]:
        self.num_calls += 1
        if self.num_calls < 3 or seq.request.request_id != "bad":
            return []
        if isinstance(self.draft, Exception):
            raise self.draft
        return self.draft  # type: ignore[no-any-return]


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize(
    "draft", [ValueError("lost"), [64], [-1], [1, 2, 3, 4, 5], "12", [True]], ids=repr
)
def test_a_drafter_that_fails_costs_its_request_and_no_other(draft: Any, overlap: bool) -> None:
    asked = [request("bad", [1, 2], 20, seed=1), request("good", [3, 4], 20, seed=2)]
    expected = alone(Parts(new_paged, new_scheduler), asked)
    made = Parts(new_paged, new_scheduler, partial(Faulty, draft), policy=EverySequence)
    engine = made.engine(Setup(budget=MAX_LEN, spare_blocks=50, overlap=overlap))
    for r in asked:
        engine.add(r)
    tokens: Outputs = {}
    errors = {}
    while engine.has_work:
        outputs = engine.step()
        errors |= {o.request_id: o.error for o in outputs if o.error}
        collect([o for o in outputs if not o.error], tokens)
    assert set(errors) == {"bad"}
    assert tokens["good", 0] == expected["good", 0]
    assert engine.kv.num_used == 0


def engines_like(engine: Engine) -> NewEngine:
    """Engines over the components of one."""
    loop = OverlappedEngine if isinstance(engine, OverlappedEngine) else Engine
    return partial(
        loop,
        engine.scheduler,
        engine.kv,
        engine.worker,
        clock=engine.clock,
        max_num_waiting=100,
        seq_ids=engine._seq_ids,
    )


@pytest.mark.parametrize("overlap", [False, True])
def test_costs_are_measured_on_an_engine_that_is_then_as_new(overlap: bool) -> None:
    engine = Parts(new_paged, new_scheduler).engine(
        Setup(overlap=overlap, budget=MAX_LEN, max_num_seqs=4, spare_blocks=200)
    )
    costs = measure(
        engines_like(engine),
        3,
        engine.clock,
        max_num_seqs=4,
        max_num_batched_tokens=MAX_LEN,
        max_len=MAX_LEN,
    )
    assert list(costs.plain.points) == [1, 2, 4]
    assert {n: list(curve.points) for n, curve in costs.drafted.items()} == {
        1: [1, 2, 3],
        4: [1, 4, 8, 12],
    }
    assert all(
        s > 0 for curve in (costs.plain, *costs.drafted.values()) for s in curve.points.values()
    )
    assert engine.kv.num_used == 0
    assert not engine.scheduler.waiting
    assert not engine.scheduler.running
    asked = [request("r0", [1, 2, 3], 20, seed=5)]
    assert run(engines_like(engine)(None), asked) == alone(Parts(new_paged, new_scheduler), asked)


@pytest.mark.parametrize("max_len", [1, 2, 3, 5])
def test_costs_are_measured_however_short_sequences_must_be(max_len: int) -> None:
    engine = Parts(new_paged, new_scheduler).engine(Setup(budget=3, max_num_seqs=2))
    costs = measure(
        engines_like(engine),
        8,
        engine.clock,
        max_num_seqs=2,
        max_num_batched_tokens=3,
        max_len=max_len,
    )
    assert costs.without(1) > 0
    assert not engine.has_work


def test_measuring_ends_in_time_and_costs_grow_in_proportion_beyond() -> None:
    """Of steps of two seconds only the first kind is measured."""
    engine = Parts(new_paged, new_scheduler).engine(
        Setup(budget=MAX_LEN, max_num_seqs=4, spare_blocks=200)
    )
    engine.worker._faults.step_seconds = 2.0  # type: ignore[attr-defined]
    costs = measure(
        engines_like(engine),
        3,
        engine.clock,
        max_num_seqs=4,
        max_num_batched_tokens=MAX_LEN,
        max_len=MAX_LEN,
    )
    assert list(costs.plain.points) == [1]
    assert costs.drafted == {}
    assert costs.without(8) == pytest.approx(8 * costs.without(1))


def test_a_step_that_fails_while_it_is_measured_says_so() -> None:
    made = replace(Parts(new_paged, new_scheduler), drafter=None)
    engine = made.engine(Setup(budget=MAX_LEN, spare_blocks=50), faults=Faults(raise_at=3))
    with pytest.raises(PluginError, match="while its cost was measured"):
        measure(
            engines_like(engine),
            3,
            engine.clock,
            max_num_seqs=4,
            max_num_batched_tokens=MAX_LEN,
            max_len=MAX_LEN,
        )
