"""Log a line about the load every few seconds while requests are processed."""

from __future__ import annotations

import asyncio
import logging
import time

from dovetail.interfaces.server import EngineClient
from dovetail.types import EngineStats

log = logging.getLogger("dovetail.server")
INTERVAL = 10.0
"""Seconds between two lines."""


async def report_load(engine: EngineClient, interval: float = INTERVAL) -> None:
    """Log throughput, queue length, KV cache usage and prefix cache hits since the last line,
    unless no step has run since then. Runs until cancelled."""
    last, since = EngineStats(), time.monotonic()
    while True:
        await asyncio.sleep(interval)
        now, stats = time.monotonic(), engine.stats
        if stats.num_steps < last.num_steps:
            last = EngineStats()  # the counters of a new engine process start at 0
        if stats.num_steps != last.num_steps:
            log.info(load_line(last, stats, now - since))
        last, since = stats, now


def load_line(before: EngineStats, after: EngineStats, seconds: float) -> str:
    """Return the log line for the time between two snapshots."""
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
