"""Mistakes that attention kernels make."""

from __future__ import annotations

from dataclasses import replace

import torch

from dovetail.plan import Reason
from sabotage import Sabotages
from sabotage.plain_attention import PlainAttention, provider

SABOTAGES = Sabotages("attention", provider())
RANDOM, SIZES, WINDOW, CAP, SINKS = (
    "test_random_step",
    "test_every_declared_size_and_type",
    "test_sliding_window",
    "test_logit_soft_cap",
    "test_sinks",
)


def sabotage(*caught_by, **changes):
    def note(cls):
        made = provider(cls, **changes)
        return SABOTAGES.add(
            cls, caught_by, build=made.build, capabilities=made.capabilities, why_not=made.why_not
        )

    return note


@sabotage(WINDOW)
class WindowTooNarrow(PlainAttention):
    """The window is one token too narrow."""

    def seen(self, layer, query_at, key_at):
        return (key_at <= query_at) & (key_at > query_at - max(1, (layer.window or 10**9) - 1))


@sabotage(WINDOW)
class WindowTooWide(PlainAttention):
    """The window is one token too wide, where the slot can be read."""

    def seen(self, layer, query_at, key_at):
        return (key_at <= query_at) & (key_at > query_at - (layer.window or 10**9) - 1)


@sabotage(WINDOW)
class WindowIgnored(PlainAttention):
    """The window is declared and not looked at."""

    def first_seen(self, layer, first_query):
        return 0

    def seen(self, layer, query_at, key_at):
        return key_at <= query_at


@sabotage(WINDOW)
class TrimmedBlocksFollowed(PlainAttention):
    """Table entries before the window are followed, and what they lead to multiplied by zero."""

    def first_seen(self, layer, first_query):
        return 0


@sabotage(RANDOM, "test_long_context_of_few_rows")
class SeesTheFuture(PlainAttention):
    """The causal mask is one token too wide."""

    def seen(self, layer, query_at, key_at):
        return (key_at <= query_at + 1) & (key_at > query_at - (layer.window or 10**9))


@sabotage(RANDOM)
class ChunkMaskedFromZero(PlainAttention):
    """A chunk's mask takes its first query for position 0 of the keys it has computed before."""

    def seen(self, layer, query_at, key_at):
        if len(query_at) > 1:
            query_at = query_at - query_at[0]
        return super().seen(layer, query_at, key_at) | (key_at == 0)


@sabotage(RANDOM, SIZES)
class FixedBlockStride(PlainAttention):
    """Slots are computed for blocks of 16, whatever the block size."""

    def slots(self, plan, b, positions):
        found = (
            plan.batch.block_table[b, positions // plan.block_size].long() * 16
            + positions % plan.block_size
        )
        return found.clamp(max=int(plan.batch.slot_mapping.max()))


@sabotage("test_single_token", "test_nothing_behind_a_sequence_is_read")
class ReadsTheWholeBlock(PlainAttention):
    """Reads a sequence's last block to its end, and multiplies what lies behind the sequence by
    zero."""

    def row(self, layer, q, cache, plan, b):
        last = plan.batch.block_table[b, (plan.batch.host_seq_lens[b] - 1) // plan.block_size]
        return super().row(layer, q, cache, plan, b) + (cache[1][last].float().sum() * 0).to(
            q.dtype
        )


@sabotage("test_nothing_behind_a_sequence_is_read")
class ReadsOneTokenMore(PlainAttention):
    """One slot behind the sequence takes part in the softmax, unless the sequence ends with its
    block."""

    def row(self, layer, q, cache, plan, b):
        out, length = super().row(layer, q, cache, plan, b), plan.batch.host_seq_lens[b]
        if length % plan.block_size == 0:
            return out
        slot = self.slots(plan, b, torch.tensor([length]))
        v = self.spread(layer, cache[1].flatten(0, 1)[slot])[:, 0]
        return out + (0.01 * (v - out.float())).to(out.dtype)


@sabotage("test_buffers_are_reused_between_steps")
class StaleBlockTable(PlainAttention):
    """A plan is looked up by the table's address, which a worker's buffers keep from step to
    step."""

    def __init__(self):
        self.plans = {}

    def plan(self, batch, layers, block_size):
        table = batch.block_table
        kept = self.plans.setdefault((table.data_ptr(), table.shape), (table, table.clone()))[1]
        return super().plan(replace(batch, block_table=kept), layers, block_size)


@sabotage("test_long_context_of_few_rows", "test_single_token", "test_many_rows")
class HalfAccumulation(PlainAttention):
    """Logits and sums are kept in float16."""

    def logits(self, layer, q, k):
        return self.cap(layer, (q.half() @ k.half().transpose(1, 2)).float() * layer.scale)

    def combine(self, weights, v):
        return (weights.half() @ v.half()).float()


@sabotage("test_many_rows", "test_single_token")
class BrainAccumulation(PlainAttention):
    """Weights and values are rounded to bfloat16 though the model is float32."""

    def combine(self, weights, v):
        return (weights.bfloat16() @ v.bfloat16()).float()


@sabotage(SINKS)
class SinkIgnored(PlainAttention):
    """Sinks are declared and not looked at."""

    def softmax(self, layer, logits, seen):
        return super().softmax(replace(layer, sinks=None), logits, seen)


@sabotage(SINKS)
class SinkCountedTwice(PlainAttention):
    """The sink takes part once for each of two splits."""

    def sinks(self, layer):
        return layer.sinks + torch.log(torch.tensor(2.0))


@sabotage(SINKS)
class SinkScaled(PlainAttention):
    """The sink is scaled as if it were a product of query and key."""

    def sinks(self, layer):
        return layer.sinks * layer.scale


@sabotage(CAP)
class CapBeforeScale(PlainAttention):
    """The soft cap is applied before the scale."""

    def logits(self, layer, q, k):
        return self.cap(layer, q.float() @ k.transpose(1, 2)) * layer.scale


@sabotage(CAP)
class CapAfterMask(PlainAttention):
    """The soft cap is applied after masking, and makes minus infinity a number."""

    def softmax(self, layer, logits, seen):
        if layer.logit_soft_cap is None:
            return super().softmax(layer, logits, seen)
        return super().softmax(
            layer, logits.masked_fill(~seen, -layer.logit_soft_cap), torch.ones_like(seen)
        )


@sabotage(CAP)
class CapIgnored(PlainAttention):
    """The soft cap is declared and not looked at."""

    def cap(self, layer, logits):
        return logits


@sabotage("test_query_heads_share_kv_heads")
class HeadsModulo(PlainAttention):
    """Query head h reads KV head h % Hkv instead of h // group."""

    def spread(self, layer, x):
        return x.float().repeat(1, layer.num_heads // layer.num_kv_heads, 1).transpose(0, 1)


@sabotage("test_query_heads_share_kv_heads")
class LargeGroups(PlainAttention):
    """Of a group of more than 8 query heads, those after the eighth read the next KV head."""

    def spread(self, layer, x):
        group = layer.num_heads // layer.num_kv_heads
        heads = [
            min(h // group + (h % group >= 8), layer.num_kv_heads - 1)
            for h in range(layer.num_heads)
        ]
        return x.float()[:, heads].transpose(0, 1)


@sabotage("test_single_token", "test_only_the_steps_slots_are_written")
class WritesTheNullBlock(PlainAttention):
    """Padding tokens are written to slot 0."""

    def write(self, cache, plan, k, v):
        super().write(cache, plan, k, v)
        cache[0][0, 0] = 0


@sabotage("test_single_token", "test_only_the_steps_slots_are_written")
class WritesWholeBlocks(PlainAttention):
    """What follows the step's last token in its block is cleared."""

    def write(self, cache, plan, k, v):
        super().write(cache, plan, k, v)
        for slot in plan.batch.slot_mapping.tolist():
            if slot + 1 not in plan.batch.slot_mapping and (slot + 1) % plan.block_size:
                cache[1].flatten(0, 1)[slot + 1] = 0


@sabotage("test_many_rows", "test_single_token")
class ForgetsAValue(PlainAttention):
    """The value of a step's last token is not written."""

    def write(self, cache, plan, k, v):
        slot = plan.batch.slot_mapping[-1]
        before = cache[1].flatten(0, 1)[slot].clone()
        super().write(cache, plan, k, v)
        cache[1].flatten(0, 1)[slot] = before


@sabotage("test_large_logits")
class NoMaximum(PlainAttention):
    """The softmax does not subtract its maximum."""

    def softmax(self, layer, logits, seen):
        weights = torch.exp(logits).masked_fill(~seen, 0)
        total = weights.sum(-1, keepdim=True)
        if layer.sinks is not None:
            total = total + torch.exp(layer.sinks)[:, None, None]
        return weights / total


@sabotage("test_deterministic")
class Nondeterministic(PlainAttention):
    """Sums are taken in an order that changes from run to run."""

    def combine(self, weights, v):
        order = torch.randperm(v.shape[1])
        out = weights[..., order] @ v[:, order]
        return torch.nextafter(out, out + torch.rand(()) - 0.5)


@sabotage("test_batch_invariance", batch_invariant=True)
class VariesWithTheBatch(PlainAttention):
    """Batch invariance is declared, and the number of splits follows the number of rows."""

    def row(self, layer, q, cache, plan, b):
        return torch.nextafter(
            out := super().row(layer, q, cache, plan, b), out + plan.batch.num_seqs % 2
        )


@sabotage(SIZES, head_sizes=(40, 64, 128))
class HeadSizeThatLies(PlainAttention):
    """A head size is declared that the kernel pads to a power of two, and scales for."""

    def logits(self, layer, q, k):
        if layer.head_size & (layer.head_size - 1):
            layer = replace(layer, scale=2 ** -(layer.head_size.bit_length() / 2))
        return super().logits(layer, q, k)


@sabotage(
    "test_what_is_declared_is_taken",
    why_not=lambda c: [Reason("no windows")] if c.needs.get("sliding_window") else [],
)
class DeclaredAndRefused(PlainAttention):
    """The capabilities declare windows, and `why_not` refuses them."""


@sabotage("test_declaration", devices=("cuda",))
class AnotherDevice(PlainAttention):
    """The device it is run on is not declared."""
