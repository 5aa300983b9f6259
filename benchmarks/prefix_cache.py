"""What prefix caching gains where requests begin alike, and what it costs where none does.

    python benchmarks/prefix_cache.py [--rounds 5] [--json FILE] [--only cost,shared,index,trace]

cost: 64 prompts of 128 tokens of which nothing is cached, 64 tokens of output each, in a cache that
is full, so that every block is hashed, inserted and evicted. Two engines take turns, with and
without a prefix cache; the cost is what the KV-cache manager takes longer, as a share of the time
that the steps take without. shared: 16 requests that share 512 of 544 prompt tokens, 16 output
tokens each, all at once: without a prefix cache, with an empty one, and with one that has seen the
shared part. index: hashing, and looking up and inserting blocks where a million are known. trace:
hits on a made-up day of conversations, as a share of an infinite cache's. Medians over rounds;
ratios are taken within a round.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from array import array
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import folder_of, prompt
from prefix_trace import conversations, replay, stats_of

from dovetail import LLM, SamplingParams
from dovetail.engine.kv_cache import PagedKVCache
from dovetail.sequence import Sequence
from dovetail.types import KVGroup, Request
from dovetail_bench.machine import machine
from dovetail_prefix_cache.eviction import LeastFrequentlyUsed, LeastRecentlyUsed, MakePolicy
from dovetail_prefix_cache.index import HashIndex

SIZE = 16
"""Tokens of a block."""
KNOWN = 1_000_000
"""Blocks that the index holds."""
ALIKE, OWN, SAMPLES, REQUESTS = 512, 32, 16, 16
WORKER = {"use": "torch", "num_threads": 1}
"""Two threads would wait for whichever is interrupted, and small models on a busy machine show that
and nothing else."""
Figures = dict[str, float]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--only", default="cost,shared,index,trace")
    args = parser.parse_args()
    cases: dict[str, Callable[[int], list[Figures]]] = {
        "cost": cost,
        "shared": shared,
        "index": index,
        "trace": trace,
    }
    results: dict[str, Any] = {}
    for name in args.only.split(","):
        rounds = cases[name](args.rounds)
        medians = {key: statistics.median(r[key] for r in rounds) for key in rounds[0]}
        results[name] = {"median": medians, "rounds": rounds}
        print(name)
        for key, value in medians.items():
            low, high = min(r[key] for r in rounds), max(r[key] for r in rounds)
            print(f"  {key:58s} {value:10.4g}   ({low:.4g} … {high:.4g})", flush=True)
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, **results}, indent=1, ensure_ascii=False) + "\n"
        )


# What it costs.


class Timed:
    """A KV-cache manager's time, in `seconds`."""

    METHODS = ("grow", "reuse", "computed", "trim", "free", "share")

    def __init__(self, llm: LLM) -> None:
        self.seconds = 0.0
        engine = llm.engine
        for name in self.METHODS:
            timed = self._timed(getattr(engine.kv, name))
            setattr(engine.kv, name, timed)
        # The scheduler's own is behind the check of plans.
        engine.scheduler._inner.kv = engine.kv  # type: ignore[attr-defined]

    def _timed(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def timed(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **kwargs)
            finally:
                self.seconds += time.perf_counter() - began

        return timed


def cost(num_rounds: int) -> list[Figures]:
    """Of the demo model, the tiny one and the shape of Qwen3-0.6B; of the latter 8 prompts, and one
    round."""
    models = {
        "demo": ("demo", 64),
        "tiny": (str(folder_of("c")), 64),
        "Qwen3-0.6B shape": (str(folder_of("a")), 8),
    }
    found = {
        name: cost_of(model, count, num_rounds if count == 64 else 1)
        for name, (model, count) in models.items()
    }
    return [
        {
            f"{name}, {key}": value
            for name, rounds in found.items()
            for key, value in rounds[i % len(rounds)].items()
        }
        for i in range(num_rounds)
    ]


def cost_of(model: str, num_prompts: int, num_rounds: int) -> list[Figures]:
    settings: dict[str, Any] = {
        "model": model,
        "device": "cpu",
        "max_model_len": 512,
        "worker": WORKER,
    }
    with LLM(**settings, prefix_cache="none") as llm:
        group = llm.engine.kv.groups[0]
        # Room for all that run, and for a third more.
        memory = num_prompts * 4 / 3 * (128 + 64) / group.block_size * group.bytes_per_block / 2**30
    settings["kv_cache"] = {"use": "paged", "memory_gb": memory}
    params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=True)
    seed = 0
    rounds: list[Figures] = []
    with (
        LLM(**settings, prefix_cache="none") as without,
        LLM(**settings, prefix_cache="hash") as having,
    ):
        engines = {"without": (without, Timed(without)), "with": (having, Timed(having))}
        for turn in range(num_rounds + 1):
            figures: Figures = {}
            for name in ("without", "with") if turn % 2 else ("with", "without"):
                llm, timed = engines[name]
                timed.seconds, seed = 0.0, seed + 1000
                began = time.perf_counter()
                llm.generate([prompt(128, seed + i) for i in range(num_prompts)], params)
                figures[f"{name}: seconds"] = time.perf_counter() - began
                figures[f"{name}: seconds of the manager"] = timed.seconds
            added = (
                figures["with: seconds of the manager"] - figures["without: seconds of the manager"]
            )
            figures["added host time, µs a block"] = 1e6 * added / (num_prompts * 12)
            figures["added host time, % of the steps"] = 100 * added / figures["without: seconds"]
            if turn:  # the first warms up, and fills the cache
                rounds.append(figures)
        stats = having.engine.snapshot()
        assert stats.num_prefix_hit_tokens == 0, "prompts were alike"
        assert stats.num_prefix_evicted_blocks["device_full"] > 0, "nothing was evicted"
    return rounds


# What it gains.


def shared(num_rounds: int) -> list[Figures]:
    settings: dict[str, Any] = {
        "model": "demo",
        "device": "cpu",
        "max_model_len": 1024,
        "worker": WORKER,
    }
    params = SamplingParams(max_tokens=SAMPLES, temperature=0, ignore_eos=True)
    rounds: list[Figures] = []
    with LLM(**settings, prefix_cache="none") as off, LLM(**settings, prefix_cache="hash") as on:
        for turn in range(num_rounds + 1):
            begin = prompt(ALIKE, turn)
            asked = [[*begin, *prompt(OWN, 1000 * turn + i)] for i in range(REQUESTS)]
            again = [[*begin, *prompt(OWN, 1000 * turn + 500 + i)] for i in range(REQUESTS)]
            seconds: Figures = {}
            for name in ("off", "on") if turn % 2 else ("on", "off"):
                if name == "off":
                    seconds["off"] = time_of(off, asked, params)
                else:
                    seconds["cold"] = time_of(on, asked, params)
                    seconds["warm"] = time_of(on, again, params)
            if turn:
                tokens = REQUESTS * SAMPLES
                figures = {f"{name}: output tokens/s": tokens / s for name, s in seconds.items()}
                figures["cold, all together: × off"] = seconds["off"] / seconds["cold"]
                figures["warm: × off"] = seconds["off"] / seconds["warm"]
                rounds.append(figures)
    return rounds


def time_of(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> float:
    began = time.perf_counter()
    llm.generate(prompts, params)
    return time.perf_counter() - began


# What a block costs.


def index(num_rounds: int) -> list[Figures]:
    num_blocks = [KNOWN + 20_001]
    cache = HashIndex(SIZE, num_blocks, LeastRecentlyUsed)
    length = 512
    for i in range(KNOWN // length):
        seq = sequence(i, random_tokens(length * SIZE, i))
        cache.insert(seq, 0, [list(range(1 + i * length, 1 + (i + 1) * length))])
        cache.forget(i)
    next_block, next_seq = KNOWN + 1, KNOWN
    rounds: list[Figures] = []
    for turn in range(num_rounds):
        count = 2_048
        # Not those of which the processor has just seen something: every 97th prompt.
        old = [
            sequence(
                next_seq + j, random_tokens(length * SIZE, (turn * 4 + j) * 97 % (KNOWN // length))
            )
            for j in range(4)
        ]
        new = [
            sequence(next_seq + 10 + j, random_tokens(length * SIZE, KNOWN + turn * 4 + j))
            for j in range(4)
        ]
        next_seq += 20
        hashing = clock(lambda old=old: [cache._chain(s, length) for s in old])
        assert all(len(cache.match(s, length)) == length for s in old)
        for s in old:
            cache.forget(s.seq_id)
        lookup = clock(lambda old=old: [cache.match(s, length) for s in old])
        for s in old:
            cache.forget(s.seq_id)
        blocks = [
            list(range(next_block + j * length, next_block + (j + 1) * length)) for j in range(4)
        ]
        insert = clock(
            lambda new=new, blocks=blocks: [
                cache.insert(s, 0, [b]) for s, b in zip(new, blocks, strict=True)
            ]
        )
        for s, own in zip(new, blocks, strict=True):
            cache.forget(s.seq_id)
            for block in reversed(own):
                cache.keep(0, block)
        evict = clock(lambda: cache.evict(0, count))  # noqa: B023 - called at once
        rounds.append(
            {
                "hashing, million tokens/s": count * SIZE / hashing / 1e6,
                "lookup with its hash, µs a block": 1e6 * lookup / count,
                "insert with its hash, µs a block": 1e6 * insert / count,
                "lookup and insert, hashed once, µs a block": (
                    1e6 * (lookup + insert - hashing) / count
                ),
                "evict, µs a block": 1e6 * evict / count,
            }
        )
    return rounds


def clock(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def random_tokens(count: int, seed: int) -> list[int]:
    """Token ids, all different objects from those of other prompts, as they are when requests come
    in."""
    mixed = (seed * 2_654_435_761) & 0xFFFFFFFF
    return array("I", ((mixed + i * 40_503) % 150_000 for i in range(count))).tolist()


def sequence(seq_id: int, tokens: list[int]) -> Sequence:
    return Sequence(
        seq_id, Request(f"r{seq_id}", tokens, SamplingParams(max_tokens=1), 1, 0, []), 0, tokens
    )


# What is found.


def trace(num_rounds: int) -> list[Figures]:
    """The device holds a tenth of what an infinite cache keeps, the host the rest and what runs."""
    groups = [KVGroup([0], "full", SIZE, 1)]
    rounds: list[Figures] = []
    for seed in range(num_rounds):
        prompts = conversations(seed)
        whole = [sum(-(-len(p) // SIZE) for p in prompts)]
        best = PagedKVCache(groups, whole, HashIndex(SIZE, whole, LeastRecentlyUsed))
        most = replay(best, prompts, SIZE)
        needed = stats_of(best).num_prefix_blocks["device"]
        device, host = [needed // 10], [needed - needed // 10 + 300]
        figures = {"an infinite cache's hits, % of the tokens": 100 * most / sum(map(len, prompts))}
        policies: dict[str, MakePolicy] = {"lru": LeastRecentlyUsed, "lfu": LeastFrequentlyUsed}
        for name, policy in policies.items():
            alone = PagedKVCache(groups, device, HashIndex(SIZE, device, policy))
            tiered = PagedKVCache(groups, device, HashIndex(SIZE, device, policy, None, host), host)
            figures[f"{name}, device alone: % of an infinite cache's hits"] = (
                100 * replay(alone, prompts, SIZE) / most
            )
            figures[f"{name}, device and host: % of an infinite cache's hits"] = (
                100 * replay(tiered, prompts, SIZE) / most
            )
        rounds.append(figures)
    return rounds


if __name__ == "__main__":
    main()
