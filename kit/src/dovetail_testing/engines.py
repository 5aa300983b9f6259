"""Run schedulers and KV-cache managers in engines with a simulated worker, whose output depends on
the contents of the cache, and with a watch that checks each plan against the contracts. A failure
is an `AssertionError`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from hypothesis import strategies as st

from dovetail.engine.adaptive import EverySequence
from dovetail.engine.block_pool import NULL_BLOCK, blocks_per_sequence
from dovetail.engine.checks import CheckedDrafter
from dovetail.engine.engine import Engine, OverlappedEngine, Step
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.speculation import Speculation
from dovetail.interfaces.drafter import Drafter
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler
from dovetail.types import KVGroup, Request, SamplingParams, SequenceOutput, StepPlan
from dovetail_testing.clock import VirtualClock
from dovetail_testing.machines import Machine, beginning, operation
from dovetail_testing.simulated import Faults, SimulatedWorker

MAX_LEN = 48
EOS = 7
MANY_STEPS = 10_000
Outputs = dict[tuple[str, int], list[int]]
"""Output tokens by (request id, sample index)."""


@dataclass(frozen=True)
class Setup:
    """Limits of an engine. `spare_blocks` is the number of blocks of each group beyond those for
    one sequence of maximum length."""

    overlap: bool = False
    block_size: int = 4
    window: int | None = None
    budget: int = 16
    max_num_seqs: int = 4
    spare_blocks: int = 0
    host_blocks: int = 0
    """Number of blocks of the host tier in each group."""

    @property
    def groups(self) -> list[KVGroup]:
        full = KVGroup([0], "full", self.block_size, 1)
        return (
            [full]
            if self.window is None
            else [full, KVGroup([1], "sliding", self.block_size, 1, self.window)]
        )

    @property
    def num_blocks(self) -> list[int]:
        return [
            1 + self.spare_blocks + blocks_per_sequence(g, MAX_LEN, self.budget)
            for g in self.groups
        ]


@dataclass
class Known:
    """The state of a sequence that the worker knows from the plans so far."""

    num_tokens: int
    num_computed: int | None
    """None if the sequence has just been started."""
    was_drafted: bool = False
    """True if its last row had draft tokens."""


@dataclass
class Watch:
    """Checks every plan against the contract. `known` has what the worker knows."""

    setup: Setup
    engine: Engine
    known: dict[int, Known] = field(default_factory=dict)

    def schedule(
        self, schedule: Callable[..., StepPlan | None], in_flight: bool
    ) -> StepPlan | None:
        scheduler = self.engine.scheduler
        before = scheduler.num_preemptions
        plan = schedule(in_flight=in_flight)
        assert not in_flight or scheduler.num_preemptions == before, (
            "the scheduler preempted a sequence while a step was in flight"
        )
        return plan

    def plan(self, plan: StepPlan) -> None:
        setup, total = self.setup, sum(plan.num_tokens)
        assert 0 < total <= setup.budget, (
            f"a plan has {total} tokens; max_num_batched_tokens is {setup.budget}"
        )
        assert len(plan.seq_ids) == len(set(plan.seq_ids)), (
            f"a sequence has two rows in one plan: {plan.seq_ids}"
        )
        running = len(self.engine.scheduler.running)
        assert max(running, len(plan.seq_ids)) <= setup.max_num_seqs, (
            f"{running} sequences run; max_num_seqs is {setup.max_num_seqs}"
        )
        restarted = set(plan.released) & {s.seq_id for s in plan.starts}
        assert not restarted or len(plan.starts) == len(plan.seq_ids), (
            f"sequences {sorted(restarted)} were preempted and restarted in one plan while others"
            " run: thrashing"
        )
        for seq_id in plan.released:
            assert self.known.pop(seq_id, None), (
                f"the plan releases sequence {seq_id}, which the worker does not know"
            )
        for start in plan.starts:
            assert start.seq_id not in self.known, (
                f"the plan starts sequence {start.seq_id}, which the worker already knows"
            )
            self.known[start.seq_id] = Known(len(start.token_ids), None)
            shared = {
                len(table) * g.block_size
                for table, g in zip(start.block_ids, setup.groups, strict=True)
            }
            first = (
                plan.num_computed[plan.seq_ids.index(start.seq_id)]
                if start.seq_id in plan.seq_ids
                else 0
            )
            assert shared == {first}, (
                f"sequence {start.seq_id} starts with {shared} shared tokens, but its first row"
                f" starts at {first}"
            )
        drafts = plan.draft_token_ids or [[] for _ in plan.seq_ids]
        for row in zip(
            plan.seq_ids, plan.num_tokens, plan.num_computed, plan.samples, drafts, strict=True
        ):
            self._row(*row)

    def _row(self, seq_id: int, count: int, computed: int, samples: bool, draft: list[int]) -> None:
        known, seq = self.known.get(seq_id), self.engine.sequences.get(seq_id)
        assert seq is not None, (
            f"the plan has a row of sequence {seq_id}, which has ended or never existed"
        )
        assert seq.finish_reason is None, f"the plan has a row of the ended sequence {seq_id}"
        assert known is not None, (
            f"the plan has a row of sequence {seq_id}, which was never started"
        )
        assert count > 0, f"sequence {seq_id} has a row of {count} tokens"
        # The number of accepted draft tokens is known only when the step has ended, and a sequence
        # with draft tokens is not continued before that.
        if known.was_drafted:
            known.num_computed, known.num_tokens = seq.num_computed_tokens - count, len(seq.tokens)
        assert not draft or count == len(draft) + 1, (
            f"sequence {seq_id} has {count} tokens with {len(draft)} draft tokens"
        )
        if known.num_computed is not None:
            assert computed == known.num_computed, (
                f"sequence {seq_id} has {known.num_computed} computed tokens, but its row starts at"
                f" {computed}"
            )
        end, num_tokens = computed + count, known.num_tokens + len(draft)
        assert end <= num_tokens, (
            f"sequence {seq_id} has {num_tokens} tokens, but its row ends at {end}"
        )
        is_last = end == num_tokens < seq.max_len
        assert samples == is_last, (
            f"the row of sequence {seq_id} up to token {end} of {known.num_tokens} has"
            f" samples={samples}"
        )
        for table, group in zip(self.engine.kv.block_ids(seq_id), self.setup.groups, strict=True):
            assert len(table) * group.block_size >= end, (
                f"sequence {seq_id} has too few blocks for {end} tokens: {table}"
            )
        known.num_computed, known.num_tokens, known.was_drafted = (
            end,
            known.num_tokens + samples,
            bool(draft),
        )

    def sequences(self) -> None:
        """Check the sequences between steps: each one that has not ended waits or runs, exactly
        once."""
        scheduler = self.engine.scheduler
        held = [s.seq_id for s in (*scheduler.waiting, *scheduler.running)]
        assert len(held) == len(set(held)), f"a sequence is held twice: {sorted(held)}"
        assert set(held) == set(self.engine.sequences), (
            f"the scheduler holds {sorted(held)}, but the live sequences are"
            f" {sorted(self.engine.sequences)}"
        )
        if isinstance(self.engine.kv, PagedKVCache):
            blocks_add_up(self.engine.kv)
            for seq in scheduler.waiting:
                assert seq.seq_id not in self.engine.kv.tables, (
                    f"sequence {seq.seq_id} waits but holds blocks"
                )


def blocks_add_up(kv: PagedKVCache) -> None:
    """Check the block accounting of the core's own manager: every block is free, evictable or held,
    and its references equal the number of holders."""
    for group, pool in enumerate(kv.pools):
        held: dict[int, int] = {}
        for tables in kv.tables.values():
            for block in tables[group]:
                if block != NULL_BLOCK:
                    held[block] = held.get(block, 0) + 1
        assert held == {b: n for b, n in enumerate(pool.references) if n}, (
            "reference counts differ from the number of holders"
        )
        if kv.prefix is not None and (tier := kv.prefix.host) is not None:
            host = [*tier.free[group], *tier.cached[group]]
            first, count = kv.num_blocks[group], tier.num_blocks[group]
            assert sorted(host) == list(range(first, first + count)), (
                "a host block was leaked, or is both free and cached"
            )
        evictable = pool.evictable
        assert len(set(pool.free_ids)) == len(pool.free_ids), "a block was freed twice"
        assert set(pool.free_ids) | set(held) | evictable == set(range(1, len(pool.references))), (
            "a block was leaked"
        )
        assert not set(pool.free_ids) & set(held), "a free block is in use"
        assert not evictable & (set(pool.free_ids) | set(held)), (
            "an evictable block is free or in use"
        )


class WatchedEngine(Engine):
    watch: Watch

    def schedule(self, *, in_flight: bool) -> StepPlan | None:
        return self.watch.schedule(super().schedule, in_flight)

    def submit(self, plan: StepPlan) -> Step | None:
        self.watch.plan(plan)
        return super().submit(plan)


class WatchedOverlappedEngine(WatchedEngine, OverlappedEngine):
    """A watched overlapped engine: the watch comes first in the method order."""


NewDrafter = Callable[[], Drafter]
BuildKV = Callable[[Setup], KVCacheManager]
BuildScheduler = Callable[[Setup, KVCacheManager], Scheduler]


@dataclass(frozen=True)
class Parts:
    """Functions that build the components under test."""

    kv: BuildKV
    scheduler: BuildScheduler
    drafter: NewDrafter | None = None
    num_draft_tokens: int = 4
    drafts_in_worker: bool = False
    policy: Callable[[], EverySequence] = EverySequence

    def engine(
        self, setup: Setup, faults: Faults | None = None, max_num_waiting: int = 100_000
    ) -> WatchedEngine:
        clock, faults = VirtualClock(), faults or Faults(step_seconds=1e-3)
        worker = SimulatedWorker(setup.groups, faults=faults, clock=clock)
        worker.allocate(setup.num_blocks)
        worker.allocate_host([setup.host_blocks] * len(setup.groups))
        kv = self.kv(setup)
        loop, speculation = WatchedOverlappedEngine if setup.overlap else WatchedEngine, None
        if self.drafter is not None:
            drafter = CheckedDrafter(
                self.drafter(), worker.vocab_size, runs_in_worker=self.drafts_in_worker
            )
            speculation = Speculation(drafter, self.num_draft_tokens, self.policy(), clock)
        scheduler = self.scheduler(setup, kv)
        engine = loop(
            scheduler, kv, worker, speculation, clock=clock, max_num_waiting=max_num_waiting
        )
        engine.watch = Watch(setup, engine)
        return engine


def request(
    name: str, prompt: list[int], max_tokens: int = 8, *, n: int = 1, seed: int = 0, level: int = 0
) -> Request:
    max_tokens = min(max_tokens, MAX_LEN - len(prompt))
    return Request(
        name, prompt, SamplingParams(n=n, max_tokens=max_tokens), max_tokens, seed, [EOS], level
    )


def collect(outputs: list[SequenceOutput], into: Outputs) -> None:
    for o in outputs:
        assert o.error is None, o.error and o.error[1]
        into.setdefault((o.request_id, o.sample_index), []).extend(o.token_ids)


def run(engine: Engine, requests: list[Request], arrivals: list[int] | None = None) -> Outputs:
    """Run all requests and return their outputs; request i is added before step `arrivals[i]`."""
    pending = sorted(zip(arrivals or [0] * len(requests), range(len(requests)), strict=True))
    tokens: Outputs = {}
    for step in range(MANY_STEPS):
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        if not engine.has_work and not pending:
            assert engine.kv.num_used == 0, (
                f"{engine.kv.num_used} blocks are still in use after all sequences have ended"
            )
            return tokens
        collect(engine.step(), tokens)
    raise AssertionError(
        f"after {MANY_STEPS} steps, sequences {sorted(engine.sequences)} have not ended"
    )


def run_with_failures(engine: Engine, requests: list[Request], arrivals: list[int]) -> Outputs:
    """Run requests although steps fail; return the outputs of those that ended without an error."""
    pending = sorted(zip(arrivals, range(len(requests)), strict=True))
    tokens: Outputs = {}
    failed: set[str] = set()
    for step in range(MANY_STEPS):
        while pending and pending[0][0] <= step:
            engine.add(requests[pending.pop(0)[1]])
        if not engine.has_work and not pending:
            break
        outputs = engine.step()
        failed |= {o.request_id for o in outputs if o.error}
        collect([o for o in outputs if not o.error], tokens)
    assert not engine.has_work, (
        f"after {MANY_STEPS} steps, sequences {sorted(engine.sequences)} have not ended"
    )
    assert engine.kv.num_used == 0, (
        f"{engine.kv.num_used} blocks are still in use after all sequences have ended"
    )
    return {key: ids for key, ids in tokens.items() if key[0] not in failed}


def alone(parts: Parts, requests: list[Request], window: int | None = None) -> Outputs:
    """Return the output of each request run by itself, in one chunk, with spare blocks."""
    out: Outputs = {}
    for r in requests:
        out |= run(
            parts.engine(
                Setup(window=window, budget=MAX_LEN, max_num_seqs=r.params.n, spare_blocks=500)
            ),
            [r],
        )
    return out


prompts = st.lists(st.integers(0, 63), min_size=1, max_size=30)
prefixes = st.sampled_from(
    [[1, 2, 3, 4, 5, 6, 7, 8] * 3, [1, 2, 3, 4] * 4, [9] * 20, [1, 2, 3, 4, 9, 9, 9, 9, 9], [5]]
)
"""Prefixes that many requests share."""
alike = st.builds(
    lambda head, cut, tail: (head[:cut] + tail)[:30],
    prefixes,
    st.integers(1, 24),
    st.lists(st.integers(0, 9)),
)
"""Prompts with common prefixes."""
setups = st.builds(
    Setup,
    overlap=st.booleans(),
    block_size=st.sampled_from([1, 2, 4, 16]),
    window=st.sampled_from([None, 3, 9]),
    budget=st.integers(1, 40),
    max_num_seqs=st.integers(1, 5),
    spare_blocks=st.integers(0, 12),
)


@dataclass(frozen=True)
class Asked:
    """A request of a workload, with the step before which it arrives."""

    prompt: list[int]
    max_tokens: int
    n: int
    level: int
    arrival: int


asked = st.builds(
    Asked,
    prompts,
    max_tokens=st.integers(1, 18),
    n=st.sampled_from([1, 1, 1, 2, 3]),
    level=st.integers(-1, 1),
    arrival=st.integers(0, 12),
)
workloads = st.lists(asked, min_size=1, max_size=7)
asked_alike = st.builds(
    Asked,
    alike,
    max_tokens=st.integers(1, 18),
    n=st.sampled_from([1, 1, 1, 2]),
    level=st.integers(-1, 1),
    arrival=st.sampled_from([0, 0, 0, 1, 2, 3, 9, 30]),
)
workloads_alike = st.lists(asked_alike, min_size=1, max_size=8)


def requests_of(workload: list[Asked]) -> list[Request]:
    return [
        request(f"r{i}", a.prompt, a.max_tokens, n=a.n, seed=i, level=a.level)
        for i, a in enumerate(workload)
    ]


class EngineMachine(Machine):
    """A state machine with random adds, aborts and steps. Its invariants are checked after each,
    and in the end all requests must have ended."""

    engine: WatchedEngine

    def __init__(self, parts: Parts) -> None:
        super().__init__()
        self.parts = parts
        self.num_requests = 0
        self.expected: set[tuple[str, int]] = set()
        self.ended: set[tuple[str, int]] = set()

    @beginning(setup=setups)
    def build(self, setup: Setup) -> None:
        self.engine = self.parts.engine(setup)

    @operation(
        prompt=prompts, max_tokens=st.integers(1, 20), n=st.integers(1, 3), level=st.integers(-1, 1)
    )
    def add(self, prompt: list[int], max_tokens: int, n: int, level: int) -> None:
        name, self.num_requests = f"r{self.num_requests}", self.num_requests + 1
        self.expected |= {(name, i) for i in range(n)}
        self.engine.add(request(name, prompt, max_tokens, n=n, level=level))

    @operation(which=st.integers(0, 30), sample=st.sampled_from([None, 0, 1]))
    def abort(self, which: int, sample: int | None) -> None:
        self.engine.abort(f"r{which}", sample)  # the request may run, have ended, or not exist

    @operation(count=st.integers(1, 8))
    def step(self, count: int) -> None:
        self._run(count)

    def _run(self, count: int) -> None:
        for _ in range(count):
            for output in self.engine.step():
                assert output.error is None, output.error and output.error[1]
                if output.finish_reason:
                    key = (output.request_id, output.sample_index)
                    assert key not in self.ended, f"{key} ended twice"
                    self.ended.add(key)

    def check(self) -> None:
        self.engine.watch.sequences()

    def end(self) -> None:
        self._finish()
        self.engine.add(request("the last one", [1, 2, 3], 2))
        self.expected.add(("the last one", 0))
        self._finish()
        left = sorted(self.engine.watch.known)
        assert len(left) <= 1, (
            f"ended sequences were not released: the worker still knows {left[:-1]}"
        )

    def _finish(self) -> None:
        for _ in range(MANY_STEPS):
            if not self.engine.has_work:
                break
            self._run(1)
        assert self.ended == self.expected, (
            f"after {MANY_STEPS} more steps, not ended: {sorted(self.expected - self.ended)}"
        )
        assert self.engine.kv.num_used == 0, (
            f"{self.engine.kv.num_used} blocks are still in use after all requests have ended"
        )


class AlikeMachine(EngineMachine):
    """The same with requests that have common prefixes, resets of the prefix cache, and an optional
    host tier."""

    def __init__(self, parts: Parts, *, has_host_tier: bool = False) -> None:
        super().__init__(parts)
        self.has_host_tier = has_host_tier

    @beginning(setup=setups, host_blocks=st.integers(1, 40))
    def build(self, setup: Setup, host_blocks: int) -> None:  # type: ignore[override]
        self.engine = self.parts.engine(
            replace(setup, host_blocks=host_blocks) if self.has_host_tier else setup
        )

    @operation(prompt=alike, max_tokens=st.integers(1, 20), n=st.sampled_from([1, 1, 2]))
    def add_alike(self, prompt: list[int], max_tokens: int, n: int) -> None:
        name, self.num_requests = f"r{self.num_requests}", self.num_requests + 1
        self.expected |= {(name, i) for i in range(n)}
        self.engine.add(request(name, prompt, max_tokens, n=n))

    @operation()
    def reset_prefix_cache(self) -> None:
        self.engine.kv.reset_prefix_cache()
