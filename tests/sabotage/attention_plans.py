"""Mistakes that attention backends make with plans, with the cache, and with long or wide steps:
they join attention's."""

from __future__ import annotations

from dataclasses import replace

import torch

from sabotage.attention import SIZES, sabotage
from sabotage.plain_attention import PlainAttention

OLD_PLAN = "test_an_old_plan_does_the_new_step"


@sabotage(OLD_PLAN)
class LengthsOfTheHost(PlainAttention):
    """What is captured has the host's lengths in it."""

    def lengths(self, plan):
        return plan.batch.host_seq_lens


@sabotage(OLD_PLAN)
class CopiedTable(PlainAttention):
    """`plan` copies the block table to a place of its own, a new one each time."""

    def plan(self, batch, layers, block_size):
        return super().plan(
            replace(batch, block_table=batch.block_table.clone()), layers, block_size
        )


@sabotage("test_rows_of_a_step_share_blocks")
class RowByRow(PlainAttention):
    """A row's keys and values are written when its turn comes."""

    def write(self, cache, plan, k, v):
        self.pending = (k, v)

    def rows(self, plan):
        return reversed(range(plan.batch.num_seqs))

    def row(self, layer, q, cache, plan, b):
        start, end = plan.batch.host_query_start[b : b + 2]
        one = replace(
            plan, batch=replace(plan.batch, slot_mapping=plan.batch.slot_mapping[start:end])
        )
        PlainAttention.write(self, cache, one, *(x[start:end] for x in self.pending))
        return super().row(layer, q, cache, plan, b)


@sabotage("test_two_plans_live_side_by_side")
class OnePlan(PlainAttention):
    """The plan is kept in the backend: another group's overwrites it."""

    def plan(self, batch, layers, block_size):
        self.kept = super().plan(batch, layers, block_size)
        return self.kept

    def run(self, layer, q, k, v, cache, plan, out):
        super().run(layer, q, k, v, cache, self.kept, out)


@sabotage("test_one_plan_serves_all_layers")
class ScaleOfTheFirstLayer(PlainAttention):
    """Every layer is run with the scale of its group's first."""

    def row(self, layer, q, cache, plan, b):
        return super().row(replace(layer, scale=plan.layers[0].scale), q, cache, plan, b)


@sabotage("test_export_and_import")
class ExportsInOrder(PlainAttention):
    """Blocks are exported in ascending order, whatever order was asked for."""

    def export_kv(self, cache, block_ids, out=None):
        return super().export_kv(cache, sorted(block_ids), out)


@sabotage("test_export_and_import")
class ExportsItsOwnLayout(PlainAttention):
    """Heads and slots of what is exported have changed places."""

    def export_kv(self, cache, block_ids, out=None):
        return tuple(x.transpose(1, 2) for x in super().export_kv(cache, block_ids, out))


@sabotage("test_export_fills_what_it_is_given")
class OutNotFilled(PlainAttention):
    """What is exported is returned in new arrays, where `out` was given."""

    def export_kv(self, cache, block_ids, out=None):
        return super().export_kv(cache, block_ids)


@sabotage("test_long_context_of_few_rows")
class SplitsWithoutRescaling(PlainAttention):
    """Splits of 1024 keys are averaged by their lengths, not by their sums."""

    def softmax(self, layer, logits, seen):
        if logits.shape[-1] <= 1024 or layer.sinks is not None:
            return super().softmax(layer, logits, seen)
        parts = [
            super(SplitsWithoutRescaling, self).softmax(layer, x, s)
            * x.shape[-1]
            / logits.shape[-1]
            for x, s in zip(logits.split(1024, -1), seen.split(1024, -1), strict=True)
        ]
        return torch.cat(parts, -1)


@sabotage("test_long_context_of_few_rows")
class ShortContextsOnly(PlainAttention):
    """Keys after the 2048th are left out."""

    def seen(self, layer, query_at, key_at):
        return super().seen(layer, query_at, key_at) & ((key_at < 2048) | (key_at == query_at))


@sabotage("test_many_rows")
class FewRowsOnly(PlainAttention):
    """The grid has 64 rows."""

    def rows(self, plan):
        return range(min(64, plan.batch.num_seqs))


@sabotage(SIZES)
class FloatCacheOnly(PlainAttention):
    """A KV dtype is declared in which the keys lose their exponent's range: they are halved when
    they are stored."""

    def write(self, cache, plan, k, v):
        narrow = cache[0].dtype != torch.float32
        super().write(cache, plan, k / 2 if narrow else k, v)
