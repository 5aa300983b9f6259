"""Test the contract of the `eviction` extension point. A plugin's test is a subclass:

class TestMyPolicy(EvictionContract):
    provider = PROVIDER
"""

from __future__ import annotations

from functools import partial
from typing import ClassVar

from hypothesis import strategies as st

from dovetail.engine.kv_cache import PagedKVCache
from dovetail.plugin.extension_points import ExtensionPoint
from dovetail_prefix_cache import EVICTION
from dovetail_prefix_cache.eviction import EvictionPolicy
from dovetail_prefix_cache.index import HashIndex
from dovetail_testing.contract import Contract, common_causes
from dovetail_testing.engines import EngineMachine, Parts, Setup
from dovetail_testing.machines import Machine, beginning, operation
from dovetail_testing.prefix_cache import new_scheduler


class EvictionContract(Contract):
    """The tests of an `eviction` provider: subclass and set `provider`."""

    extension_point = "eviction"
    added: ClassVar[tuple[ExtensionPoint, ...]] = (EVICTION,)

    def new(self, num_blocks: int) -> EvictionPolicy:
        policy: EvictionPolicy = self.build()(num_blocks)
        return policy

    @common_causes(
        "`pop` does not remove the block", "`remove` leaves an entry", "`clear` leaves state"
    )
    def test_every_block_leaves_once(self) -> None:
        """`pop` returns each block that was added and not removed since exactly once."""
        self.run_machine(partial(PolicyMachine, self), examples=150)

    @common_causes("state is stored in the class or the module instead of the object")
    def test_policies_do_not_meet(self) -> None:
        """Policies of different KV groups do not share state."""
        make = self.build()
        policies = [make(8) for _ in range(2)]
        for block in (1, 2, 3):
            policies[0].add(block)
            policies[1].add(block + 3)
        policies[0].remove(2)
        gone = [
            sorted(policy.pop() for _ in range(count))
            for policy, count in zip(policies, (2, 3), strict=True)
        ]
        assert gone == [
            [1, 3],
            [4, 5, 6],
        ], f"policies with the blocks [1, 3] and [4, 5, 6] returned {gone[0]} and {gone[1]}"

    @common_causes("the policies of two groups or two engines share state")
    def test_engine_invariants_hold(self) -> None:
        """With the hash index in random engines, blocks are conserved and every request ends."""

        def new_kv(setup: Setup) -> PagedKVCache:
            return PagedKVCache(
                setup.groups,
                setup.num_blocks,
                HashIndex(setup.block_size, setup.num_blocks, self.build()),
            )

        self.run_machine(partial(EngineMachine, Parts(new_kv, new_scheduler)), examples=40)


class PolicyMachine(Machine):
    policy: EvictionPolicy

    def __init__(self, contract: EvictionContract) -> None:
        super().__init__()
        self.contract = contract
        self.here: set[int] = set()

    @beginning(num_blocks=st.integers(2, 12))
    def build(self, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.policy = self.contract.new(num_blocks)

    @operation(blocks=st.lists(st.integers(1, 11), min_size=1, max_size=6, unique=True))
    def add(self, blocks: list[int]) -> None:
        self._add(blocks)

    def _add(self, blocks: list[int]) -> None:
        for block in blocks:
            if block < self.num_blocks and block not in self.here:
                self.policy.add(block)
                self.here.add(block)

    @operation(which=st.integers(0, 11))
    def remove(self, which: int) -> None:
        if self.here:
            block = sorted(self.here)[which % len(self.here)]
            self.policy.remove(block)
            self.here.discard(block)

    @operation(count=st.integers(1, 4))
    def pop(self, count: int) -> None:
        for _ in range(min(count, len(self.here))):
            block = self.policy.pop()
            assert block in self.here, f"{block} was popped, but the policy has {sorted(self.here)}"
            self.here.discard(block)

    @operation(blocks=st.lists(st.integers(1, 11), min_size=1, max_size=2, unique=True))
    def clear_and_begin_anew(self, blocks: list[int]) -> None:
        self.policy.clear()
        self.here.clear()
        self._add(blocks)

    def end(self) -> None:
        left = [self.policy.pop() for _ in range(len(self.here))]
        assert sorted(left) == sorted(self.here), (
            f"{left} were popped at the end, but the policy had {sorted(self.here)}"
        )
