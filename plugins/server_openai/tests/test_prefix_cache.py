"""Test the prefix cache as clients see it: salts, `cached_tokens`, and the reset."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest

COMPLETIONS, CHAT = "/v1/completions", "/v1/chat/completions"
PROMPT = "a prompt of more than three blocks of sixteen tokens, one a byte"
MESSAGES = [{"role": "user", "content": PROMPT}]
BODIES: dict[str, dict[str, Any]] = {COMPLETIONS: {"prompt": PROMPT}, CHAT: {"messages": MESSAGES}}


@pytest.fixture
def cached(start: Callable[..., Any]) -> Any:
    return start(prefix_cache="hash")


def num_cached(http: httpx.Client, route: str, **more: Any) -> int:
    answer = http.post(route, json={**BODIES[route], "max_tokens": 4, "seed": 1, **more})
    assert answer.status_code == 200, answer.text
    tokens: int = answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]
    return tokens


@pytest.mark.parametrize("route", [COMPLETIONS, CHAT])
def test_usage_tells_what_was_cached_and_salts_keep_apart(cached: Any, route: str) -> None:
    with cached.client() as http:
        assert num_cached(http, route) == 0
        again = num_cached(http, route)
        assert again >= 48
        assert again % 16 == 0
        assert num_cached(http, route, n=3, max_tokens=20) == again
        salted = [num_cached(http, route, cache_salt=salt) for salt in ("a", "b", "a", "b" * 256)]
        assert salted == [0, 0, again, 0]
        stream = http.post(
            route,
            json={
                **BODIES[route],
                "max_tokens": 4,
                "stream": True,
                "stream_options": {"include_usage": True},
            },
        )
        assert f'"cached_tokens":{again}' in stream.text.replace(" ", "")
        metrics = cached.metrics()
        assert metrics["prefix_cache_hits_total"] >= 4 * again
        assert metrics["prefix_cache_queries_total"] > metrics["prefix_cache_hits_total"]


def test_a_reset_forgets_and_loses_nothing(cached: Any) -> None:
    with cached.client() as http:
        assert num_cached(http, COMPLETIONS) == 0
        assert num_cached(http, COMPLETIONS) > 0
        assert http.post("/reset_prefix_cache").status_code == 200
        assert num_cached(http, COMPLETIONS) == 0
        assert http.get("/reset_prefix_cache").status_code == 405


def test_metrics_tell_of_tiers_and_evictions(start: Callable[..., Any]) -> None:
    served = start(
        prefix_cache={"use": "hash", "host_memory_gb": 0.001},
        scheduler={"use": "fcfs", "max_num_seqs": 1},
        max_model_len=128,
    )
    with served.client() as http:
        for _ in range(2):
            for i in range(6):
                http.post(COMPLETIONS, json={"prompt": str(i) * 80, "max_tokens": 4, "seed": 1})
        served.until(served.quiet)
        m = served.metrics()
        assert m["prefix_cache_evicted_blocks_total{to_host}"] > 0
        assert (
            m["prefix_cache_evicted_blocks_total{device_full}"]
            == m["prefix_cache_evicted_blocks_total{host_full}"]
            == 0
        )
        assert m["prefix_cache_blocks{device}"] > 0
        assert (host := m["prefix_cache_blocks{host}"]) > 0
        assert m["prefix_cache_hits_total"] == 6 * 64
        http.post("/reset_prefix_cache")
        served.until(lambda: served.metrics()["prefix_cache_blocks{host}"] == 0)
        assert served.metrics()["prefix_cache_evicted_blocks_total{reset}"] >= host


def test_resets_under_load_change_no_answer(cached: Any) -> None:
    def ask(i: int) -> str:
        body = {"prompt": f"{PROMPT} {i % 3}", "max_tokens": 40, "seed": i % 3, "ignore_eos": True}
        with cached.client() as own:
            answer = own.post(COMPLETIONS, json=body)
        assert answer.status_code == 200, answer.text
        text: str = answer.json()["choices"][0]["text"]
        return text

    expected = [ask(i) for i in range(3)]
    with cached.client() as http, ThreadPoolExecutor(12) as pool:
        answers = [pool.submit(ask, i) for i in range(48)]
        for _ in range(40):
            assert http.post("/reset_prefix_cache").status_code == 200
        assert [a.result() for a in answers] == [expected[i % 3] for i in range(48)]
    cached.until(cached.quiet)


def test_a_reset_needs_an_engine_and_the_key(start: Callable[..., Any]) -> None:
    served = start(server={"api_key": "k"}, prefix_cache="hash")
    with served.client() as http:
        assert http.post("/reset_prefix_cache").status_code == 401
        assert (
            http.post("/reset_prefix_cache", headers={"Authorization": "Bearer k"}).status_code
            == 200
        )
