"""Test the contract of the KV-cache extension point. A plugin's test is a subclass:

    class TestMyBlocks(KVCacheContract):
        provider = PROVIDER

The docstrings of its checks state the requirements.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from functools import partial

import pytest
from hypothesis import strategies as st

from dovetail.assembly.builtins import dovetail_schedulers
from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.interfaces.scheduler import Scheduler
from dovetail.plugin.provider import KVCacheOptions, SchedulerOptions
from dovetail.types import KVGroup
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.dictionary import DictionaryIndex
from dovetail_testing.engines import (
    Asked,
    EngineMachine,
    Parts,
    Setup,
    alone,
    request,
    requests_of,
    run,
    setups,
    workloads_alike,
)
from dovetail_testing.machines import Machine, beginning, operation

FCFS = dovetail_schedulers()[0]
NULL_BLOCK = 0


class KVCacheContract(Contract):
    """The contract of KV-cache managers. Subclass it and set `provider`."""

    extension_point = "kv_cache"

    def new(self, groups: list[KVGroup], num_blocks: list[int]) -> KVCacheManager:
        manager: KVCacheManager = self.build(
            self.build_context(kv_groups=tuple(groups), num_blocks=tuple(num_blocks))
        )
        return manager

    @property
    def parts(self) -> Parts:
        return Parts(lambda setup: self.new(setup.groups, setup.num_blocks), self.new_scheduler)

    def new_scheduler(self, setup: Setup, kv: KVCacheManager) -> Scheduler:
        options = SchedulerOptions(
            max_num_seqs=setup.max_num_seqs, max_num_batched_tokens=setup.budget
        )
        scheduler: Scheduler = FCFS.build(self.build_context(kv=kv), options)
        return scheduler

    @common_causes("the options do not extend KVCacheOptions", "num_total includes the null block")
    def test_declaration(self) -> None:
        """The options are a subclass of `KVCacheOptions`; a new manager has all blocks except the
        null blocks, and none is in use."""
        assert issubclass(self.provider.options, KVCacheOptions), (
            "the options must be a subclass of KVCacheOptions"
        )
        groups, num_blocks = Setup(window=5).groups, [9, 7]
        kv = self.new(groups, num_blocks)
        assert (kv.groups, kv.num_blocks) == (
            groups,
            num_blocks,
        ), "groups and num_blocks must be those passed to build"
        assert (kv.num_total, kv.num_used) == (
            14,
            0,
        ), f"num_total is {kv.num_total} and num_used {kv.num_used}, not 14 and 0"

    @common_causes(
        "a block with several holders is freed twice, or not at all",
        "a partial block is shared",
        "blocks of one group are allocated before another is found to have too few",
        "`free` frees trimmed blocks again",
    )
    def test_blocks_are_conserved(self) -> None:
        """In any sequence of grow, share, trim and free: each block is either free or held; a new
        block has no other holder and is never the null block; only whole blocks are shared; only
        blocks that no later token attends to are trimmed; a failed call changes nothing."""
        self.run_machine(partial(BlocksMachine, self), examples=120)

    @common_causes(
        "an off-by-one in the number of free blocks", "one block is reserved per sequence"
    )
    def test_the_last_block_can_be_had(self) -> None:
        """All blocks except the null block can be allocated, repeatedly."""
        kv = self.new([KVGroup([0], "full", 4, 1)], [11])
        for _ in range(3):
            added = kv.grow(1, 40)
            assert added is not None, "10 blocks of 4 tokens are free, but 40 tokens do not fit"
            assert sorted(added[0]) == list(range(1, 11)), (
                f"10 blocks are free, but {added[0]} were allocated"
            )
            assert kv.grow(2, 1) is None, "no block is free, but one token fits"
            kv.free(1)
            assert kv.num_used == 0, f"all blocks were freed, but num_used is {kv.num_used}"

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "blocks are returned in a different order than in the table",
        "a trimmed entry is removed instead of replaced by the null block",
    )
    def test_an_engine_runs_on_it(self, overlap: bool) -> None:
        """In an engine with scarce memory, sliding windows and shared prompts, every sequence has
        the same output as with enough memory."""
        workload = [request(f"r{i}", [i] * (9 + 3 * i), 20, n=1 + i % 2, seed=i) for i in range(5)]
        for window in (None, 5):
            tight = self.parts.engine(Setup(overlap=overlap, window=window, spare_blocks=3))
            roomy = self.parts.engine(
                Setup(window=window, budget=200, max_num_seqs=9, spare_blocks=300)
            )
            assert run(tight, workload) == run(roomy, workload)

    @common_causes(
        "state of a sequence outlives `free`",
        "a sequence that shares its prompt is aborted",
    )
    def test_blocks_are_returned(self) -> None:
        """Requests are added, run and aborted at any time: outputs are correct, and in the end all
        blocks are free."""
        self.run_machine(partial(EngineMachine, self.parts), examples=25)

    @common_causes(
        "`reuse` returns None without `may_wait`", "blocks that were found are not referenced"
    )
    def test_a_prefix_cache_changes_no_output(self) -> None:
        """With a prefix cache, whether the manager uses it or not, every sequence has the same
        output as alone, and all blocks become free."""

        def new_kv(setup: Setup) -> KVCacheManager:
            index = DictionaryIndex(setup.block_size, len(setup.groups))
            context = self.build_context(
                kv_groups=tuple(setup.groups),
                num_blocks=tuple(setup.num_blocks),
                prefix_cache=index,
            )
            manager: KVCacheManager = self.build(context)
            return manager

        def same_as_alone(setup: Setup, workload: list[Asked]) -> None:
            requests = requests_of(workload)
            expected = alone(self.parts, requests, setup.window)
            got = run(
                Parts(new_kv, self.new_scheduler).engine(setup),
                requests,
                [a.arrival for a in workload],
            )
            different = [key for key in expected if got.get(key) != expected[key]]
            assert not different, f"the outputs of {different} differ from those alone"

        self.run_examples(same_as_alone, examples=40, setup=setups, workload=workloads_alike)


@dataclass(frozen=True)
class Kind:
    """Layer kind of a group."""

    block_size: int
    window: int | None = None


@dataclass
class Model:
    """The simplest possible manager: it records the tables that were returned."""

    tables: dict[int, list[list[int]]] = field(default_factory=dict)
    num_tokens: dict[int, int] = field(default_factory=dict)
    """Number of tokens for which each sequence has slots."""
    num_computed: dict[int, int] = field(default_factory=dict)
    """Number of computed tokens at its last trim."""

    def held(self, group: int) -> set[int]:
        return {b for tables in self.tables.values() for b in tables[group]} - {NULL_BLOCK}


class BlocksMachine(Machine):
    """Random calls of a manager, compared with a `Model` of it."""

    kv: KVCacheManager

    def __init__(self, contract: KVCacheContract) -> None:
        super().__init__()
        self.contract = contract
        self.model = Model()
        self.next_id = 0

    @beginning(
        kinds=st.lists(
            st.builds(Kind, st.sampled_from([1, 2, 4, 8]), st.none() | st.integers(1, 12)),
            min_size=1,
            max_size=3,
        ),
        num_blocks=st.integers(2, 24),
    )
    def build(self, kinds: list[Kind], num_blocks: int) -> None:
        self.groups = [
            KVGroup(
                [i], "full" if kind.window is None else "sliding", kind.block_size, 1, kind.window
            )
            for i, kind in enumerate(kinds)
        ]
        self.num_blocks = [num_blocks + i for i, _ in enumerate(self.groups)]
        self.kv = self.contract.new(self.groups, self.num_blocks)

    @operation(which=st.integers(0, 9), more=st.integers(0, 20))
    def grow(self, which: int, more: int) -> None:
        known = sorted(self.model.tables)
        seq_id = known[which] if which < len(known) else self._new_id()
        self._grow(seq_id, self.model.num_tokens.get(seq_id, 0) + more)

    def _grow(self, seq_id: int, num_tokens: int) -> None:
        model, kv = self.model, self.kv
        before = model.tables.get(seq_id, [[] for _ in self.groups])
        needed = [
            max(0, -(-num_tokens // g.block_size) - len(t))
            for g, t in zip(self.groups, before, strict=True)
        ]
        free = [n - 1 - len(model.held(i)) for i, n in enumerate(self.num_blocks)]
        fits = all(n <= f for n, f in zip(needed, free, strict=True))
        added = kv.grow(seq_id, num_tokens)
        if added is None:
            assert not fits, f"grow returned None: {needed} blocks are needed, and {free} are free"
            return
        assert fits, f"grow returned {added}: {needed} blocks are needed, and {free} are free"
        assert [len(a) for a in added] == needed, (
            f"grow to {num_tokens} tokens added {added}; {needed} blocks are needed"
        )
        for group, blocks in enumerate(added):
            assert NULL_BLOCK not in blocks, f"the null block of group {group} was allocated"
            assert len(set(blocks)) == len(blocks), (
                f"a block was returned twice in one call: {blocks}"
            )
            assert all(0 < b < self.num_blocks[group] for b in blocks), (
                f"{blocks} are not ids of {self.num_blocks[group]} blocks"
            )
            twice = model.held(group) & set(blocks)
            assert not twice, (
                f"blocks {sorted(twice)} of group {group} were allocated while others hold them"
            )
        model.tables[seq_id] = [[*t, *a] for t, a in zip(before, added, strict=True)]
        model.num_tokens[seq_id] = max(num_tokens, model.num_tokens.get(seq_id, 0))

    @operation(which=st.integers(0, 9), num_tokens=st.integers(0, 40), more=st.integers(0, 9))
    def share(self, which: int, num_tokens: int, more: int) -> None:
        if not self.model.tables:
            return
        source, target = self._known(which), self._new_id()
        num_tokens = min(num_tokens, self.model.num_tokens[source])
        got = self.kv.share(source, target, num_tokens)
        assert 0 <= got <= num_tokens, f"at most {num_tokens} tokens may be shared, but {got} were"
        if got:
            partial = [g.block_size for g in self.groups if got % g.block_size]
            assert not partial, (
                f"{got} tokens were shared, but only whole blocks may be; the block sizes are"
                f" {partial}"
            )
            tables = self.model.tables[source]
            heads = [t[: got // g.block_size] for t, g in zip(tables, self.groups, strict=True)]
            assert not any(NULL_BLOCK in h for h in heads), f"trimmed tokens were shared: {heads}"
            self.model.tables[target], self.model.num_tokens[target] = heads, got
            self._same_tables()
        self._grow(target, got + more)

    @operation(which=st.integers(0, 9), more=st.integers(0, 30))
    def trim(self, which: int, more: int) -> None:
        if not self.model.tables:
            return
        seq_id = self._known(which)
        computed = min(self.model.num_tokens[seq_id], self.model.num_computed.get(seq_id, 0) + more)
        self.model.num_computed[seq_id] = computed
        self.kv.trim(seq_id, computed)
        for group, table in zip(self.groups, self.model.tables[seq_id], strict=True):
            # The next token, at position `computed`, attends to window - 1 tokens before it.
            first_seen = 0 if group.window is None else max(0, computed - group.window + 1)
            for i in range(min(first_seen // group.block_size, len(table))):
                table[i] = NULL_BLOCK

    @operation(which=st.integers(0, 12))
    def free(self, which: int) -> None:
        known = sorted(self.model.tables)
        # Also for a sequence that never had blocks.
        seq_id = known[which] if which < len(known) else 10**6
        self.kv.free(seq_id)
        for of in (self.model.tables, self.model.num_tokens, self.model.num_computed):
            of.pop(seq_id, None)

    def check(self) -> None:
        self._same_tables()
        used = sum(len(self.model.held(i)) for i in range(len(self.groups)))
        assert self.kv.num_used == used, (
            f"num_used is {self.kv.num_used}, but {used} blocks are held"
        )
        assert self.kv.num_total == sum(n - 1 for n in self.num_blocks), "num_total has changed"

    def end(self) -> None:
        for seq_id in list(self.model.tables):
            self.kv.free(seq_id)
        assert self.kv.num_used == 0, f"all blocks were freed, but num_used is {self.kv.num_used}"
        self.model = Model()
        self._grow(
            self._new_id(),
            min((n - 1) * g.block_size for n, g in zip(self.num_blocks, self.groups, strict=True)),
        )

    def _same_tables(self) -> None:
        for seq_id, tables in self.model.tables.items():
            now = [list(t) for t in self.kv.block_ids(seq_id)]
            assert now == tables, (
                f"the block tables of sequence {seq_id} are {now}, but must be {tables}"
            )

    def _known(self, which: int) -> int:
        known = sorted(self.model.tables)
        return known[which % len(known)]

    def _new_id(self) -> int:
        self.next_id += 1
        return self.next_id
