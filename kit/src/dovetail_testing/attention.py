"""Test the contract of the attention extension point. A plugin's test is a subclass:

    class TestMyAttention(AttentionContract):
        provider = PROVIDER
        device = "cuda:0"

The tests follow from the provider's declared capabilities; the reference is softmax(q·k) v in
float64.
"""

from __future__ import annotations

import itertools
import random
from dataclasses import replace
from functools import partial

import pytest

from dovetail.plugin.provider import Context
from dovetail_testing.attention_steps import (
    LARGEST,
    Row,
    Step,
    StepSpec,
    block_sizes,
    head_sizes,
    padded,
    plain,
    random_spec,
    simpler,
)
from dovetail_testing.attention_trial import AttentionTrial, same
from dovetail_testing.contract import common_causes

NUM_RANDOM_STEPS = 40
HOST_FIELDS = (
    "host_query_start",
    "host_seq_lens",
    "num_seqs",
    "num_tokens",
    "max_query_len",
    "max_seq_len",
)


class AttentionContract(AttentionTrial):
    """The contract of attention providers. Subclass it and set `provider`."""

    extension_point = "attention"

    # The declaration.

    @common_causes("a field of AttentionCapabilities is empty")
    def test_declaration(self) -> None:
        """The capabilities declare the framework, at least one dtype and KV dtype, and the device
        under test."""
        can = self.can
        assert can.framework == "torch", "the kit supports only torch tensors"
        assert self.device.split(":")[0] in can.devices, (
            f"the device under test, {self.device}, must be declared"
        )
        assert can.dtypes, "at least one dtype must be declared"
        assert can.kv_dtypes, "at least one KV dtype must be declared"

    @common_causes(
        "`why_not` rejects what the capabilities declare",
        "a size or type is declared but was never tested",
    )
    def test_what_is_declared_is_taken(self) -> None:
        """If the provider is requested by name, the core accepts everything that it declares."""
        for context in self.contexts(declared=True):
            refusal = self.refusal(context)
            assert refusal is None, f"{_described(context)} is declared but rejected: {refusal}"

    @common_causes(
        "a capability is declared by mistake",
        "head_sizes or block_sizes is None, which means any",
    )
    def test_what_is_not_declared_is_refused(self) -> None:
        """If the provider is requested by name for anything that it does not declare, it is
        rejected with a reason."""
        for context in self.contexts(declared=False):
            refusal = self.refusal(context)
            assert refusal is not None, (
                f"{_described(context)} is not declared, but is not rejected"
            )

    @common_causes("`out` is ignored", "new arrays are returned instead of `out`")
    def test_export_fills_what_it_is_given(self) -> None:
        """`export_kv` with `out` writes the same blocks there as without it, and returns `out`."""
        import torch

        step = Step(plain(self.can, Row(0, 60), Row(30, 2), seed=self.seed), self.device)
        cache, blocks = self.fill(step), list(range(1, step.num_blocks, 2))
        plain_export = self.backend.export_kv(cache, blocks)
        keys, values = (torch.full_like(x, 7, device="cpu") for x in plain_export)
        exported = self.backend.export_kv(cache, blocks, out=(keys, values))
        for given, got, expected in zip((keys, values), exported, plain_export, strict=True):
            assert given is got, "`out` must be returned"
            assert same(given, expected.cpu()), "the contents of `out` differ from the blocks"

    # Results, for everything that is declared.

    @pytest.mark.parametrize("index", range(NUM_RANDOM_STEPS))
    @common_causes(
        "the block table or the slots are indexed with the wrong stride",
        "the mask is wrong for a chunk whose first query is not at position 0",
    )
    def test_random_step(self, index: int) -> None:
        """Any ragged mix of prefill, chunks and decode within the declaration gives softmax(scale ·
        q·k) v."""
        self.check(random_spec(self.can, self.seed + index))

    @common_causes(
        "a size is assumed to be a power of two",
        "sums are kept in the storage type instead of float32",
    )
    def test_every_declared_size_and_type(self) -> None:
        """Every declared head size, block size, dtype and KV dtype works."""
        rows = (Row(0, 37), Row(300, 1), Row(17, 20))
        usual = plain(self.can, *rows, seed=self.seed)
        specs = [replace(usual, head_size=n) for n in head_sizes(self.can)]
        specs += [replace(usual, block_size=n) for n in block_sizes(self.can)]
        specs += [
            replace(usual, dtype=d, kv_dtype=kv)
            for d in self.can.dtypes
            for kv in self.can.kv_dtypes
        ]
        for spec in specs:
            self.check(spec)

    @pytest.mark.parametrize("group", [1, 2, 5, 8, 16])
    @common_causes(
        "head h is mapped to KV head h % Hkv instead of h // (Hq / Hkv)",
        "a group size does not fill a tile",
    )
    def test_query_heads_share_kv_heads(self, group: int) -> None:
        """Query head h reads KV head h // (Hq / Hkv)."""
        self.check(
            plain(self.can, Row(0, 50), Row(90, 1), Row(90, 3), num_heads=2 * group, seed=self.seed)
        )

    @common_causes(
        "split softmax is merged without rescaling by the maxima",
        "sums are kept in a type narrower than float32",
    )
    def test_long_context_of_few_rows(self) -> None:
        """Few rows with thousands of tokens, whose keys a kernel may split between workers, are as
        exact as others."""
        for rows in ((Row(2999, 1),), (Row(4095, 1), Row(10, 1)), (Row(2500, 30),)):
            self.check(plain(self.can, *rows, num_heads=2, num_kv_heads=1, seed=self.seed))

    @common_causes("a grid or workspace is sized for fewer rows")
    def test_many_rows(self) -> None:
        """A step may have many rows."""
        self.check(plain(self.can, *(Row(n, 1) for n in range(70)), seed=self.seed))

    @common_causes(
        "a loop over earlier blocks is empty",
        "slots of the last block behind the sequence's end are read",
    )
    def test_single_token(self) -> None:
        """A sequence of one token attends to itself."""
        self.check(plain(self.can, Row(0, 1), seed=self.seed))

    @pytest.mark.parametrize("window", [1, 2, 16, 17, 100, 10_000])
    @common_causes(
        "off by one: a token attends to itself and to window - 1 tokens before it",
        "table entries before the window are followed",
    )
    def test_sliding_window(self, window: int) -> None:
        """With a window, a token attends to itself and the window - 1 tokens before it, and no
        table entry before that is followed."""
        self.needs_feature("sliding_window")
        rows = (Row(0, 130), Row(700, 1), Row(301, 40), Row(3, 1))
        for canary in (False, True):
            self.check(plain(self.can, *rows, window=window, canary=canary, seed=self.seed))

    @pytest.mark.parametrize("cap", [1.0, 30.0])
    @common_causes(
        "the cap is applied before the scale",
        "the cap is applied after masking, which makes -inf finite",
    )
    def test_logit_soft_cap(self, cap: float) -> None:
        """A soft cap maps the scaled logit x to cap · tanh(x / cap), before the softmax."""
        self.needs_feature("logit_soft_cap")
        self.check(
            plain(self.can, Row(0, 70), Row(200, 1), logit_soft_cap=cap, scale=1.0, seed=self.seed)
        )
        self.check(plain(self.can, Row(0, 70), Row(200, 1), logit_soft_cap=cap, seed=self.seed))

    @common_causes(
        "the sink is left out of the sum, or counted once per split",
        "the sink is scaled or capped, although it is already a logit",
    )
    def test_sinks(self) -> None:
        """A sink takes part in the softmax of its head as one more logit that carries no value."""
        self.needs_feature("sinks")
        rows = (Row(0, 70), Row(200, 1), Row(0, 1))
        self.check(plain(self.can, *rows, sinks=True, seed=self.seed))
        self.check(plain(self.can, *rows, sinks=True, scale=0.5, seed=self.seed))

    @common_causes(
        "exp is computed without subtracting the row's maximum",
        "weights are kept in float16, whose largest number is 65504",
    )
    def test_large_logits(self) -> None:
        """Logits of several hundred do not overflow: the softmax subtracts its maximum."""
        self.check(plain(self.can, Row(0, 70), Row(600, 1), scale=20.0, seed=self.seed))

    @pytest.mark.parametrize("largest", [(0.5, 4.0), (6.0, 0.25)])
    @common_causes(
        "the keys' scale is used for values",
        "values are not clamped before they are cast",
        "each head has its own scale",
    )
    def test_scales_of_keys_and_values(self, largest: tuple[float, float]) -> None:
        """In a one-byte KV dtype, keys have one scale and values another; numbers out of range are
        clamped."""
        kinds = [kv_dtype for kv_dtype in self.can.kv_dtypes if kv_dtype in LARGEST]
        if not kinds:
            pytest.skip(f"no one-byte KV dtype is declared: {', '.join(LARGEST)}")
        for kv_dtype in kinds:
            self.check(
                plain(
                    self.can,
                    Row(0, 37),
                    Row(90, 1),
                    kv_dtype=kv_dtype,
                    kv_range=largest,
                    seed=self.seed,
                )
            )

    # What is read and written.

    @pytest.mark.parametrize("index", range(6))
    @common_causes(
        "padding rows or tokens are written to block 0",
        "a whole block is written where the step has only part of it",
    )
    def test_only_the_steps_slots_are_written(self, index: int) -> None:
        """A step writes the slots of its tokens and no others: each other slot contains a distinct
        number, which must not change."""
        self.check(replace(random_spec(self.can, self.seed + 4000 + index), canary=True))

    @common_causes(
        "0 · NaN is NaN: masked weights are multiplied with values that must not be read",
        "reads continue up to the block's end",
    )
    def test_nothing_behind_a_sequence_is_read(self) -> None:
        """No slot behind a sequence's end is read, wherever in a block it ends: these slots contain
        NaN, or other numbers."""
        size = plain(self.can).block_size
        rows = [
            Row(2 * size + extra, 1)
            for extra in dict.fromkeys((0, 1, size // 2, size - 2, size - 1))
            if extra >= 0
        ]
        for canary in (False, True):
            self.check(plain(self.can, *rows, canary=canary, seed=self.seed))

    @common_causes("the keys of a row are written when it is computed, not before any row is read")
    def test_rows_of_a_step_share_blocks(self) -> None:
        """Rows read blocks that another row of the same step writes: everything is written before
        anything is read."""
        size = plain(self.can).block_size
        lender = Row(size // 2, 5 * size)
        borrowers = [
            Row(n * size + extra, 1 + extra, shares=(0, n * size))
            for n in (1, 3, 5)
            for extra in (0, 3)
        ]
        self.check(plain(self.can, lender, *borrowers, seed=self.seed))

    @common_causes(
        "a table, its lengths or its splits are those of the previous step",
        "a plan is looked up by the address of a buffer",
    )
    def test_buffers_are_reused_between_steps(self) -> None:
        """The worker reuses its buffers: a step's numbers count, although they are where those of
        the previous step were."""
        rows = ((Row(40, 1), Row(0, 33)), (Row(33, 1), Row(8, 33)))
        first, second = (
            Step(plain(self.can, *r, seed=self.seed + i), self.device) for i, r in enumerate(rows)
        )
        batches = [s.batch(width=first.table_width + second.table_width) for s in (first, second)]
        for step, batch in zip((first, second), batches, strict=True):
            for name in ("query_start", "seq_lens", "block_table", "slot_mapping"):
                getattr(batches[0], name).copy_(getattr(batch, name))
            reused = replace(batches[0], **{n: getattr(batch, n) for n in HOST_FIELDS})
            cache, out = self.fill(step), self.new_out(step)
            plan = self.backend.plan(reused, [step.layer], step.spec.block_size)
            self.backend.run(step.layer, step.q, step.k, step.v, cache, plan, out)
            self.compare(step, out, "with the buffers of the previous step")

    @common_causes("the plan is stored in the backend and overwritten by that of another group")
    def test_two_plans_live_side_by_side(self) -> None:
        """A plan is valid until the next one of the same KV group; that of another group does not
        end it."""
        first = Step(plain(self.can, Row(0, 60), Row(500, 1), seed=self.seed), self.device)
        window = 50 if self.can.sliding_window else None
        second = Step(
            plain(
                self.can, Row(0, 20), Row(2000, 1), num_heads=8, window=window, seed=self.seed + 1
            ),
            self.device,
        )
        caches = [self.fill(s) for s in (first, second)]
        plans = [
            self.backend.plan(s.batch(), [s.layer], s.spec.block_size) for s in (first, second)
        ]
        for step, cache, plan in zip((first, second), caches, plans, strict=True):
            out = self.new_out(step)
            self.backend.run(step.layer, step.q, step.k, step.v, cache, plan, out)
            self.compare(step, out, "with another group's plan in between")

    @common_causes("scale, soft cap or sinks are those of the plan's first layer")
    def test_one_plan_serves_all_layers(self) -> None:
        """Layers of a group share a plan but differ in scale, soft cap and sinks."""
        base = plain(self.can, Row(0, 40), Row(200, 1), seed=self.seed)
        others = [replace(base, scale=0.5)]
        if self.can.logit_soft_cap:
            others.append(replace(base, logit_soft_cap=3.0))
        if self.can.sinks:
            others.append(replace(base, sinks=True))
        steps = [Step(s, self.device) for s in (base, *others)]
        layers = [replace(s.layer, index=i) for i, s in enumerate(steps)]
        plan = self.backend.plan(steps[0].batch(), layers, base.block_size)
        for step, layer in zip(steps, layers, strict=True):
            cache, out = self.fill(step), self.new_out(step)
            self.backend.run(layer, step.q, step.k, step.v, cache, plan, out)
            self.compare(step, out, f"in layer {layer.index} of the plan")

    # Reproducibility.

    @common_causes(
        "sums use atomic additions in the order in which threads arrive",
        "memory is read before it is written",
    )
    def test_deterministic(self) -> None:
        """The same step gives the same bits each time."""
        import torch

        def twice(spec: StepSpec) -> None:
            step = Step(spec, self.device)
            outs = [self.run(step)[0] for _ in range(3)]
            assert all(torch.equal(out, outs[0]) for out in outs), (
                "the same step gave two different results"
            )

        for i in range(3):
            self.attempt(
                random_spec(self.can, self.seed + 1000 + i), twice, partial(simpler, self.can)
            )

    @pytest.mark.parametrize("index", range(6))
    @common_causes(
        "the number of splits depends on the batch",
        "the order of summation in a GEMM depends on its shape",
    )
    def test_batch_invariance(self, index: int) -> None:
        """A token's output has the same bits alone, among other rows, and however its prompt is
        split into chunks."""
        import torch

        self.needs_feature("batch_invariant")
        rng = random.Random(self.seed + index)
        spec = replace(
            random_spec(self.can, self.seed + 2000 + index), rows=(Row(0, rng.randint(300, 1500)),)
        )
        whole = Step(spec, self.device)
        out = self.run(whole)[0]
        length = spec.rows[0].seq_len
        cuts = sorted({0, *rng.sample(range(1, length), 4), length - 1, length})

        def compare_part(given: tuple[int, int, tuple[Row, ...]]) -> None:
            begin, end, others = given
            rows = (*others, Row(begin, end - begin))
            part = self.transplant(whole, replace(spec, rows=rows, seed=spec.seed + 1), len(others))
            start = sum(r.num_new for r in others)
            assert torch.equal(self.run(part)[0][start:], out[begin:end]), (
                f"batch_invariant is declared, but tokens {begin} to {end - 1} of {length} differ"
                f" between a batch with {len(others)} other rows and one prefill; step: {spec}"
            )

        def with_less(
            given: tuple[int, int, tuple[Row, ...]],
        ) -> list[tuple[int, int, tuple[Row, ...]]]:
            begin, end, others = given
            fewer = [(begin, end, others[:i] + others[i + 1 :]) for i in range(len(others))]
            return fewer + ([(begin, (begin + end) // 2, others)] if end - begin > 1 else [])

        others: tuple[Row, ...] = (Row(0, 33), Row(900, 1), Row(10, 7))
        for begin, end in itertools.pairwise(cuts):
            self.attempt((begin, end, others), compare_part, with_less)

    @pytest.mark.parametrize("index", range(8))
    @common_causes(
        "results depend on the order of pieces",
        "the strides in AttentionCall are assumed to be contiguous",
    )
    def test_compiled_steps_do_what_run_does(self, index: int) -> None:
        """The operations of a compiled step give the same bits as `run`, whatever the order and the
        threads of an operation's pieces; q, k and v are in one buffer, as from a fused
        projection."""
        if not self.can.compiled_steps:
            pytest.skip(f"{self.provider.name} does not declare compiled_steps")
        self.attempt(
            random_spec(self.can, self.seed + 3000 + index),
            self.compiled_once,
            partial(simpler, self.can),
        )

    @pytest.mark.parametrize("index", range(6))
    @common_causes(
        "lengths, splits or a grid depend on the numbers on the host",
        "each `plan` allocates new buffers",
    )
    def test_an_old_plan_does_the_new_step(self, index: int) -> None:
        """With graph capture, the `plan` of a decode step writes the buffers that launches captured
        with the previous plan read, padding rows included: `run` with the old plan then computes
        the new step."""
        import torch

        if not self.can.graph_capture:
            pytest.skip(f"{self.provider.name} does not declare graph_capture")
        rng = random.Random(self.seed + index)
        num_rows, num_padding = rng.randint(1, 9), rng.randint(0, 3)
        like = replace(random_spec(self.can, self.seed + 5000 + index), fused=False)

        def decode(seed: int) -> Step:
            rows = tuple(
                Row(rng.choice((0, 30, 300, 2000)) + rng.randint(0, 20), 1) for _ in range(num_rows)
            )
            return Step(replace(like, rows=rows, seed=seed), self.device)

        old, new = decode(like.seed), decode(like.seed + 1)
        width = max(old.table_width, new.table_width)
        buffers = padded(old.batch(width), num_padding)
        plan = self.backend.plan(buffers, [old.layer], like.block_size)
        batch = padded(new.batch(width), num_padding)
        for name in ("query_start", "seq_lens", "block_table", "slot_mapping"):
            getattr(buffers, name).copy_(getattr(batch, name))
        self.backend.plan(
            replace(buffers, **{n: getattr(batch, n) for n in HOST_FIELDS}),
            [new.layer],
            like.block_size,
        )
        cache, (q, k, v) = (
            self.fill(new),
            (torch.cat([x, x[:1].expand(num_padding, -1, -1)]) for x in (new.q, new.k, new.v)),
        )
        out = q.new_full(q.shape, float("nan"))
        self.backend.run(new.layer, q, k, v, cache, plan, out)
        self.compare(
            new,
            out[:num_rows],
            f"with the plan of a previous step and {num_padding} padding rows",
        )

    # The cache.

    @common_causes(
        "exported KV has the order of heads and slots of the provider's own layout",
        "blocks are sorted before they are copied",
    )
    def test_export_and_import(self) -> None:
        """Both use the canonical layout `[blocks, block_size, Hkv, D]` and the requested order, and
        lose nothing."""
        for kv_dtype in self.can.kv_dtypes:
            step = Step(
                plain(self.can, Row(20, 50), kv_dtype=kv_dtype, seed=self.seed), self.device
            )
            cache = self.fill(step)
            wanted = [step.blocks[0][1], step.poison, step.blocks[0][0]]
            keys, values = self.backend.export_kv(cache, wanted)
            for got, truth, what in (
                (keys, step.before[0], "keys"),
                (values, step.before[1], "values"),
            ):
                assert tuple(got.shape) == (
                    3,
                    *truth.shape[1:],
                ), f"exported {what} must be [blocks, block_size, Hkv, D]"
                assert same(got.cpu(), truth[wanted]), (
                    f"exported {what} differ from what was imported ({kv_dtype})"
                )
            moved = [wanted[1], wanted[0]]
            self.backend.import_kv(cache, moved, keys[:2], values[:2])
            again, _ = self.backend.export_kv(cache, wanted)
            assert same(again.cpu(), keys.cpu()[[1, 0, 2]]), (
                "import_kv must write these blocks and no others"
            )


def _described(context: Context) -> str:
    return f"{context.needs} in {context.dtype} on {context.device_name}"
