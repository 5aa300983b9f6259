"""A made-up day of a chat server, for prefix caches: conversations over shared system prompts,
several at a time.

`conversations` makes the prompts, `replay` plays them against a KV-cache manager as an engine
would, without computing.
"""

from __future__ import annotations

import random
from collections import deque

from dovetail.interfaces.kv_cache import KVCacheManager
from dovetail.sequence import Sequence
from dovetail.types import EngineStats, Request, SamplingParams

NUM_RUNNING = 8
"""Sequences that hold blocks at a time."""


def conversations(
    seed: int, num_conversations: int = 150, num_systems: int = 12
) -> list[list[int]]:
    """Prompts in the order of their coming: each has a system prompt (the first ones are asked for
    most), all that was said in its conversation so far, and a new question."""
    rng = random.Random(seed)

    def tokens(low: int, high: int) -> list[int]:
        return [rng.randrange(50_000) for _ in range(rng.randint(low, high))]

    systems = [tokens(100, 900) for _ in range(num_systems)]
    popularity = [1 / (i + 1) for i in range(num_systems)]
    open_now: list[list[int]] = []
    prompts: list[list[int]] = []
    begun = 0
    while begun < num_conversations or open_now:
        if begun < num_conversations and (len(open_now) < 20 or rng.random() < 0.2):
            open_now.append(list(rng.choices(systems, popularity)[0]))
            begun += 1
        said = rng.choice(open_now)
        said += tokens(10, 120)
        prompts.append(list(said))
        said += tokens(20, 250)  # the answer
        if rng.random() < 0.25 or len(said) > 3000:
            open_now.remove(said)
    return prompts


def stats_of(kv: KVCacheManager) -> EngineStats:
    """Return the figures of a manager's prefix cache."""
    stats = EngineStats()
    kv.count(stats)
    return stats


def replay(kv: KVCacheManager, prompts: list[list[int]], block_size: int) -> int:
    """Returns how many tokens were found. Every sequence stays for as long as the next few ones
    come."""
    running: deque[Sequence] = deque()

    def end() -> None:
        seq = running.popleft()
        kv.computed(seq, len(seq.tokens))
        kv.free(seq.seq_id)

    for i, prompt in enumerate(prompts):
        seq = Sequence(
            i, Request(f"r{i}", prompt, SamplingParams(max_tokens=1), 1, 0, []), 0, list(prompt)
        )
        if len(running) == NUM_RUNNING:
            end()
        kv.reuse(seq, len(prompt) - 1)
        while kv.grow(i, len(prompt)) is None:
            kv.free(i)
            end()
            kv.reuse(seq, len(prompt) - 1)
        running.append(seq)
        kv.computed(seq, len(prompt))
        kv.block_ops.clear()
    while running:
        end()
    assert kv.num_used == 0
    return stats_of(kv).num_prefix_hit_tokens
