"""Provide the checks of the worker contract that concern a host tier."""

from __future__ import annotations

import random
from typing import Any

import pytest

from dovetail.interfaces.worker import WorkerCapabilities
from dovetail.types import BlockOp
from dovetail_testing.contract import common_causes
from dovetail_testing.worker_driver import Driver
from dovetail_testing.worker_trial import BLOCK_SIZE, WorkerTrial

NUM_HOST_BLOCKS = 6


class TierChecks(WorkerTrial):
    """Checks of a host tier, mixed into `WorkerContract`."""

    @pytest.mark.parametrize("overlap", [False, True])
    @common_causes(
        "moves are executed after the step's kernels, or out of order",
        "a layer is left out",
        "keys and values are mixed up",
        "one of several moves with the same target is lost",
    )
    def test_blocks_go_to_the_host_and_come_back(self, overlap: bool) -> None:
        """If the worker declares `host_tier`: a sequence whose blocks were moved to host memory,
        overwritten on the device, and moved back to other blocks continues as if nothing had
        happened."""
        can = self.provider.capabilities
        if not (isinstance(can, WorkerCapabilities) and can.host_tier):
            pytest.skip(f"{self.provider.name} does not declare host_tier")
        driver = self.new_driver(overlap=overlap)
        worker: Any = driver.worker
        worker.allocate_host([NUM_HOST_BLOCKS] * len(driver.groups))
        rng = random.Random(self.seed)
        try:
            self._move_and_continue(
                driver, [rng.randrange(2, self.model.vocab_size) for _ in range(4 * BLOCK_SIZE + 5)]
            )
        finally:
            worker.close()

    def _move_and_continue(self, driver: Driver, prompt: list[int]) -> None:
        seq_id = driver.add(prompt)
        driver.generate([seq_id], 4)
        (expected,) = driver.generate([seq_id], 12)
        state = driver.sequences[seq_id]
        # Back to the state after four tokens; later tokens are computed again.
        del state.tokens[len(prompt) + 4 :]
        tables = [table[:4] for table in state.tables]
        driver.release(seq_id)
        out = [
            BlockOp("out", g, block, i)
            for g, table in enumerate(tables)
            for i, block in enumerate(table)
        ]
        # One host block is written twice; the last write must win.
        first = [BlockOp("out", g, table[3], 0) for g, table in enumerate(tables)]
        self._step(driver, [*first, *out], driver.add([5, 6, 7]))
        other = driver.add([9] * (6 * BLOCK_SIZE))  # reuses the freed blocks
        driver.generate([other], 1)
        plan = driver.plan([(seq_id, 1)])
        row = plan.seq_ids.index(seq_id)
        # The sequence starts with four blocks that are moved back, and computes what follows.
        back = [
            [free.pop() for _ in table] for free, table in zip(driver.free, tables, strict=True)
        ]
        plan.block_ops = [
            BlockOp("in", g, i, block)
            for g, table in enumerate(back)
            for i, block in enumerate(table)
        ]
        plan.starts[0].block_ids = [list(table) for table in back]
        own = [[b] for b in (table[0] for table in state.tables)]
        state.tables = [[*table, *new] for table, new in zip(back, own, strict=True)]
        count = len(state.tokens) - 4 * BLOCK_SIZE
        plan.num_computed[row], plan.num_tokens[row], plan.samples[row] = (
            4 * BLOCK_SIZE,
            count,
            True,
        )
        plan.new_block_ids[row] = own
        state.num_computed = 4 * BLOCK_SIZE + count
        driver.take(plan, driver.worker.submit(plan))
        (got,) = driver.generate([seq_id], 12)
        assert got == expected, (
            f"after its blocks came back from host memory the output is {got[4:]}, but without that"
            f" it is {expected[4:]}"
        )

    def _step(self, driver: Driver, ops: list[BlockOp], seq_id: int) -> None:
        plan = driver.plan([(seq_id, 3)])
        plan.block_ops = ops
        driver.take(plan, driver.worker.submit(plan))
