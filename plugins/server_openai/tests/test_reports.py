"""Test the log line about the load."""

from __future__ import annotations

import asyncio
import logging
from types import SimpleNamespace
from typing import Any

import pytest

from dovetail.types import EngineStats
from dovetail_server_openai.reports import load_line, report_load


def test_the_line_has_rates_of_the_time_between_and_gauges_of_now() -> None:
    before = EngineStats(
        num_prompt_tokens=100,
        num_generation_tokens=10,
        num_prefix_queried_tokens=5,
        num_prefix_hit_tokens=5,
    )
    after = EngineStats(
        num_prompt_tokens=300,
        num_generation_tokens=60,
        num_prefix_queried_tokens=205,
        num_prefix_hit_tokens=55,
        num_requests_running=3,
        num_requests_waiting=2,
        kv_blocks_used=1,
        kv_blocks_total=4,
    )
    assert (
        load_line(before, after, 10.0)
        == "prompt 20.0 tok/s, generation 5.0 tok/s, running 3, waiting 2, KV cache 25.0% used,"
        " prefix cache hits 25.0%"
    )
    assert "hits 0.0%" in load_line(EngineStats(), EngineStats(), 1.0)


def test_it_is_written_only_while_something_is_done_and_survives_a_new_process(
    caplog: pytest.LogCaptureFixture,
) -> None:
    engine: Any = SimpleNamespace(stats=EngineStats())

    async def test() -> None:
        reporting = asyncio.create_task(report_load(engine, interval=0.02))
        await asyncio.sleep(0.1)
        assert not caplog.records
        engine.stats = EngineStats(num_steps=50, num_generation_tokens=50)
        await asyncio.sleep(0.1)
        assert len(caplog.records) == 1
        engine.stats = EngineStats(num_steps=2, num_generation_tokens=2)
        await asyncio.sleep(0.1)
        assert len(caplog.records) == 2
        assert "-" not in caplog.records[1].getMessage()
        reporting.cancel()

    with caplog.at_level(logging.INFO, "dovetail.server"):
        asyncio.run(test())
