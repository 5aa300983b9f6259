"""Compare the hits on a trace of conversations with those of an unbounded cache."""

from __future__ import annotations

import pytest
from prefix_trace import conversations, replay, stats_of

from dovetail.engine.kv_cache import PagedKVCache
from dovetail.types import KVGroup
from dovetail_prefix_cache.eviction import LeastFrequentlyUsed, LeastRecentlyUsed, MakePolicy
from dovetail_prefix_cache.index import HashIndex

GROUPS = [KVGroup([0], "full", 16, 1)]
PROMPTS = conversations(seed=5)
WHOLE = sum(-(-len(p) // 16) for p in PROMPTS)
"""Number of blocks of all prompts, without sharing."""


def infinite() -> PagedKVCache:
    return PagedKVCache(GROUPS, [WHOLE], HashIndex(16, [WHOLE], LeastRecentlyUsed))


@pytest.mark.parametrize("policy", [LeastRecentlyUsed, LeastFrequentlyUsed])
@pytest.mark.parametrize("on_device", [0.1, 0.2])
def test_tiers_that_hold_the_trace_find_what_an_infinite_cache_finds(
    policy: MakePolicy, on_device: float
) -> None:
    best = infinite()
    most = replay(best, PROMPTS, 16)
    needed = stats_of(best).num_prefix_blocks["device"]
    device = [int(needed * on_device)]
    host = [needed + 300 - device[0]]  # room for running sequences besides the cached blocks
    tiered = PagedKVCache(GROUPS, device, HashIndex(16, device, policy, num_host_blocks=host), host)
    found = replay(tiered, PROMPTS, 16)
    assert found >= 0.98 * most
    assert stats_of(tiered).num_prefix_evicted_blocks["to_host"] > 0
    alone = PagedKVCache(GROUPS, device, HashIndex(16, device, policy))
    assert replay(alone, PROMPTS, 16) < 0.98 * most, "the trace does not need the host"
