"""The scheduler that starts what is cached first: whom it prefers, and whom it never forgets."""

from __future__ import annotations

from collections import Counter

from hypothesis import given, settings
from hypothesis import strategies as st

from dovetail.engine.kv_cache import PagedKVCache
from dovetail.engine.longest_prefix import LongestPrefixScheduler
from dovetail.sequence import Sequence
from dovetail_testing.dictionary import DictionaryIndex
from dovetail_testing.engines import (
    Asked,
    Outputs,
    Parts,
    Setup,
    WatchedEngine,
    collect,
    request,
    requests_of,
    workloads_alike,
)


class Recording(PagedKVCache):
    """Knows who was told to wait for another one since it was last asked."""

    def __init__(self, setup: Setup) -> None:
        super().__init__(
            setup.groups, setup.num_blocks, DictionaryIndex(setup.block_size, len(setup.groups))
        )
        self.told_to_wait: set[int] = set()

    def reuse(self, seq: Sequence, num_tokens: int, *, may_wait: bool = False) -> int | None:
        found = super().reuse(seq, num_tokens, may_wait=may_wait)
        if found is None:
            self.told_to_wait.add(seq.seq_id)
        return found


def make_engine(setup: Setup, max_overtaken: int = 64) -> WatchedEngine:
    def scheduler(limits: Setup, kv: Recording) -> LongestPrefixScheduler:
        return LongestPrefixScheduler(
            kv,
            max_overtaken,
            max_num_seqs=limits.max_num_seqs,
            max_num_batched_tokens=limits.budget,
        )

    return Parts(Recording, scheduler).engine(setup)


def test_what_is_cached_begins_first() -> None:
    engine, outputs = make_engine(Setup(max_num_seqs=1, spare_blocks=100)), Outputs()
    engine.add(request("before", list(range(1, 30)), 2))
    while engine.has_work:
        collect(engine.step(), outputs)
    for name, prompt in (
        ("none", [50] * 20),
        ("some", [*range(1, 13), 50]),
        ("most", [*range(1, 25), 50]),
    ):
        engine.add(request(name, prompt, 2))
    ended: list[str] = []
    while engine.has_work:
        ended += [o.request_id for o in engine.step() if o.finish_reason]
    assert ended == ["most", "some", "none"]


@settings(deadline=None, max_examples=60)
@given(
    workload=workloads_alike,
    max_num_seqs=st.integers(1, 3),
    max_overtaken=st.integers(0, 4),
    overlap=st.booleans(),
    spare_blocks=st.integers(0, 12),
)
def test_nobody_is_overtaken_more_often_than_allowed(
    workload: list[Asked], max_num_seqs: int, max_overtaken: int, overlap: bool, spare_blocks: int
) -> None:
    engine = make_engine(
        Setup(overlap, max_num_seqs=max_num_seqs, spare_blocks=spare_blocks), max_overtaken
    )
    assert isinstance(engine.kv, Recording)
    pending = [r for _ in range(4) for r in requests_of(workload)]
    overtaken: Counter[int] = Counter()
    for i, r in enumerate(pending):
        engine.add(request(f"{i}", r.prompt_token_ids, r.max_tokens, seed=i))
    while engine.has_work:
        before = {s.seq_id for s in engine.scheduler.running}
        engine.step()
        begun = {s.seq_id for s in engine.scheduler.running} - before
        for seq_id in before | begun:  # one that is preempted waits anew
            overtaken.pop(seq_id, None)
        for seq in engine.scheduler.waiting:
            if seq.seq_id not in engine.kv.told_to_wait:
                overtaken[seq.seq_id] += sum(later > seq.seq_id for later in begun)
        engine.kv.told_to_wait.clear()
        assert max(overtaken.values(), default=0) < max_overtaken + max_num_seqs
