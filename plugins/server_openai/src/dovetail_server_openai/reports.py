"""A line about the load in the log, now and then, while there is any."""

from __future__ import annotations

import asyncio
import logging
import time

from dovetail.interfaces.server import EngineClient
from dovetail.types import EngineStats

log = logging.getLogger("dovetail.server")
EVERY = 10.0
"""Seconds between two lines."""


async def report_load(engine: EngineClient, every: float = EVERY) -> None:
    """Until cancelled, log throughput, queue, KV cache and prefix hits since the last line, if
    anything was done."""
    last, began = EngineStats(), time.monotonic()
    while True:
        await asyncio.sleep(every)
        now, stats = time.monotonic(), engine.stats
        if stats.num_steps < last.num_steps:
            last = EngineStats()  # a new process counts from the beginning
        if stats.num_steps != last.num_steps:
            log.info(load_line(last, stats, now - began))
        last, began = stats, now


def load_line(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """What happened between two snapshots."""
    prompt = (after.num_prompt_tokens - before.num_prompt_tokens) / seconds
    generated = (after.num_generation_tokens - before.num_generation_tokens) / seconds
    used = after.kv_blocks_used / after.kv_blocks_total if after.kv_blocks_total else 0.0
    queried = after.num_prefix_queried_tokens - before.num_prefix_queried_tokens
    hits = (
        (after.num_prefix_hit_tokens - before.num_prefix_hit_tokens) / queried if queried else 0.0
    )
    return (
        f"prompt {prompt:.1f} tok/s, generation {generated:.1f} tok/s, running"
        f" {after.num_requests_running}, waiting {after.num_requests_waiting}, KV cache {used:.1%}"
        f" used, prefix cache hits {hits:.1%}"
    )
