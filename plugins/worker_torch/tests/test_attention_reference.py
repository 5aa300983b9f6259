"""The reference keeps the contract, and the contract's checks notice the mistakes that kernels
make."""

from __future__ import annotations

from dataclasses import replace

import pytest

from dovetail_testing.attention import AttentionContract
from dovetail_testing.contract import Broken
from dovetail_worker_torch import attention, dovetail_attention
from dovetail_worker_torch.attention import ReferenceAttention

PROVIDER = dovetail_attention()[0]


class TestReference(AttentionContract):
    provider = PROVIDER


class NarrowWindow(ReferenceAttention):
    """Sees one token too few."""

    def run(self, layer, q, k, v, cache, plan, out):
        super().run(
            replace(layer, window=layer.window and max(1, layer.window - 1)),
            q,
            k,
            v,
            cache,
            plan,
            out,
        )


class RowByRow(ReferenceAttention):
    """Writes a row's keys and values only when it comes to the row."""

    def run(self, layer, q, k, v, cache, plan, out):
        batch = plan.batch
        for b in reversed(range(batch.num_seqs)):
            start, end = batch.host_query_start[b], batch.host_query_start[b + 1]
            one = replace(
                batch,
                block_table=batch.block_table[b : b + 1],
                slot_mapping=batch.slot_mapping[start:end],
                host_query_start=[0, end - start],
                host_seq_lens=batch.host_seq_lens[b : b + 1],
                num_seqs=1,
                num_tokens=end - start,
            )
            cut = (x[start:end] for x in (q, k, v))
            super().run(layer, *cut, cache, replace(plan, batch=one), out[start:end])


class ReadsWholeBlocks(ReferenceAttention):
    """Multiplies what lies behind the sequence's end by zero, which does not hide NaN."""

    def run(self, layer, q, k, v, cache, plan, out):
        super().run(layer, q, k, v, cache, plan, out)
        batch = plan.batch
        for b in range(batch.num_seqs):
            last = batch.block_table[b, (batch.host_seq_lens[b] - 1) // plan.block_size]
            out[batch.host_query_start[b] : batch.host_query_start[b + 1]] += (
                cache[1][last].sum() * 0
            ).to(out.dtype)


class WritesPadding(ReferenceAttention):
    """Writes a slot that is not the step's."""

    def run(self, layer, q, k, v, cache, plan, out):
        super().run(layer, q, k, v, cache, plan, out)
        cache[0][0, 0] = 0


class ForgetsSinks(ReferenceAttention):
    def run(self, layer, q, k, v, cache, plan, out):
        super().run(replace(layer, sinks=None), q, k, v, cache, plan, out)


@pytest.mark.parametrize(
    ("mistake", "check"),
    [
        (NarrowWindow, lambda c: c.test_sliding_window(17)),
        (RowByRow, lambda c: c.test_rows_of_a_step_share_blocks()),
        (ReadsWholeBlocks, lambda c: c.test_single_token()),
        (WritesPadding, lambda c: c.test_single_token()),
        (ForgetsSinks, lambda c: c.test_sinks()),
    ],
)
def test_the_contract_notices(mistake, check):
    contract = TestReference()
    contract.backend = mistake("cpu")
    with pytest.raises(
        Broken, match=r"smallest failing input: .*\n  common causes: .*\n  to reproduce"
    ):
        check(contract)


def test_the_contract_notices_undeserved_batch_invariance():
    """Matrix products of other shapes sum in another order: the reference does not declare it, and
    could not."""
    contract = type("Undeserved", (AttentionContract,), {})()
    contract.provider = replace(
        PROVIDER, capabilities=replace(PROVIDER.capabilities, batch_invariant=True)
    )
    contract.backend = ReferenceAttention("cpu")

    def all_of_them():
        for index in range(6):
            contract.test_batch_invariance(index)

    with pytest.raises(AssertionError, match="batch_invariant is declared"):
        all_of_them()


def test_a_check_cannot_be_overridden():
    with pytest.raises(TypeError, match="test_sinks"):
        type("Cheat", (AttentionContract,), {"test_sinks": lambda self: None})


def test_expected_failures_are_checks_of_the_contract():
    with pytest.raises(TypeError, match="test_nothing"):
        type("Typo", (AttentionContract,), {"expected_failures": {"test_nothing": "misspelt"}})


def test_a_long_prefill_is_cut(monkeypatch):
    """The bound on the logits' memory changes no result beyond rounding."""
    contract = TestReference()
    contract.backend = ReferenceAttention("cpu")
    monkeypatch.setattr(attention, "QUERIES_AT_A_TIME", 7)
    contract.test_long_context_of_few_rows()
    contract.test_sliding_window(16)
