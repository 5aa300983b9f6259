"""Paged attention in small methods, so that a sabotage overrides one of them. Itself it keeps the
contract."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch

from dovetail.interfaces.attention import AttentionBatch, AttentionCapabilities
from dovetail.plugin.provider import Options, Provider

CAPABILITIES = AttentionCapabilities(
    sliding_window=True, logit_soft_cap=True, sinks=True, graph_capture=True
)
LARGEST = {torch.float8_e4m3fn: 448.0, torch.int8: 127.0}


@dataclass(frozen=True)
class PlainPlan:
    batch: AttentionBatch
    block_size: int
    layers: list[Any]


class PlainAttention:
    def allocate_cache(self, spec):
        shape = (spec.num_blocks, spec.block_size, spec.num_kv_heads, spec.head_size)
        return torch.zeros(shape, dtype=getattr(torch, spec.dtype)), torch.zeros(
            shape, dtype=getattr(torch, spec.dtype)
        )

    def plan(self, batch, layers, block_size):
        return PlainPlan(batch, block_size, layers)

    def run(self, layer, q, k, v, cache, plan, out):
        self.write(cache, plan, k, v)
        starts = self.starts(plan)
        for b in self.rows(plan):
            start, end = starts[b : b + 2]
            out[start:end] = self.row(layer, q[start:end], cache, plan, b)

    def starts(self, plan):
        return plan.batch.query_start.tolist()

    def lengths(self, plan):
        return plan.batch.seq_lens.tolist()

    def rows(self, plan):
        return range(plan.batch.num_seqs)

    def write(self, cache, plan, k, v):
        for own, new in zip(cache, (k, v), strict=True):
            own.flatten(0, 1)[plan.batch.slot_mapping] = new.to(own.dtype)

    def row(self, layer, q, cache, plan, b):
        length = self.lengths(plan)[b]
        query_at = torch.arange(length - len(q), length)
        key_at = torch.arange(self.first_seen(layer, length - len(q)), length)
        slots = self.slots(plan, b, key_at)
        k, v = (self.spread(layer, c.flatten(0, 1)[slots]) for c in cache)  # [Hq, S, D]
        logits = self.logits(layer, q.transpose(0, 1), k)
        weights = self.softmax(layer, logits, self.seen(layer, query_at[:, None], key_at))
        return self.combine(weights, v).transpose(0, 1).to(q.dtype)

    def first_seen(self, layer, first_query):
        return 0 if layer.window is None else max(0, first_query - layer.window + 1)

    def slots(self, plan, b, positions):
        size = plan.block_size
        return plan.batch.block_table[b, positions // size].long() * size + positions % size

    def spread(self, layer, x):
        return x.float().repeat_interleave(layer.num_heads // layer.num_kv_heads, 1).transpose(0, 1)

    def logits(self, layer, q, k):
        return self.cap(layer, q.float() @ k.transpose(1, 2) * layer.scale)

    def cap(self, layer, logits):
        cap = layer.logit_soft_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def seen(self, layer, query_at, key_at):
        return (key_at <= query_at) & (key_at > query_at - (layer.window or 10**9))

    def softmax(self, layer, logits, seen):
        logits = logits.masked_fill(~seen, float("-inf"))
        if layer.sinks is not None:
            logits = torch.cat(
                [logits, self.sinks(layer)[:, None, None].expand(-1, logits.shape[1], 1)], -1
            )
        weights = torch.softmax(logits, -1)
        return weights if layer.sinks is None else weights[..., :-1]

    def sinks(self, layer):
        return layer.sinks

    def combine(self, weights, v):
        return weights @ v

    def export_kv(self, cache, block_ids, out=None):
        exported = cache[0][block_ids], cache[1][block_ids]
        if out is None:
            return exported
        for given, blocks in zip(out, exported, strict=True):
            given.copy_(blocks)
        return out

    def import_kv(self, cache, block_ids, keys, values):
        cache[0][block_ids], cache[1][block_ids] = keys, values


class OneByteAttention(PlainAttention):
    """With caches of one byte too: numbers are limited and rounded on the way in, and scaled back
    on the way out."""

    def run(self, layer, q, k, v, cache, plan, out):
        if cache[0].dtype in LARGEST:
            k, v = (
                self.code(layer, x.float(), which, cache[0].dtype) for which, x in enumerate((k, v))
            )
        super().run(layer, q, k, v, cache, plan, out)

    def row(self, layer, q, cache, plan, b):
        if cache[0].dtype in LARGEST:
            cache = [self.meaning(layer, own.float(), which) for which, own in enumerate(cache)]
        return super().row(layer, q, cache, plan, b)

    def code(self, layer, x, which, dtype):
        """Numbers `f32[T, Hkv, D]` that the type holds, or that its cast rounds to one: of keys (0)
        or values (1)."""
        limited = self.limited(x / self.scale(layer, which), LARGEST[dtype])
        return self.rounded(limited) if dtype == torch.int8 else limited

    def meaning(self, layer, codes, which):
        return codes * self.scale(layer, which)

    def scale(self, layer, which):
        return torch.ones(()) if layer.kv_scales is None else layer.kv_scales[which]

    def limited(self, x, largest):
        return x.clamp(-largest, largest)

    def rounded(self, x):
        return x.round()


def provider(backend=PlainAttention, **changes):
    """A provider of a backend's class; `changes` are of the capabilities, or of the provider where
    it has such a field."""
    own = {k: changes.pop(k) for k in ("why_not",) if k in changes}
    return Provider(
        "plain",
        "for tests",
        lambda c, o: backend(),
        Options,
        replace(CAPABILITIES, **changes),
        **own,
    )
