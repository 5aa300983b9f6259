"""Prometheus metrics, under vLLM's base names so that dashboards can be reused. One registry a
server."""

from __future__ import annotations

import time
from collections.abc import AsyncGenerator, Iterable
from contextlib import aclosing

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Histogram,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric
from prometheus_client.registry import Collector
from starlette.types import Scope

from dovetail.errors import DovetailError
from dovetail.frontend.outputs import Delta
from dovetail.interfaces.server import EngineClient
from dovetail.interfaces.shadow import ShadowReport
from dovetail.plan import SHADOW_PREFIX
from dovetail.types import EngineStats, Request

_FAST = (
    0.001,
    0.0025,
    0.005,
    0.01,
    0.02,
    0.03,
    0.05,
    0.075,
    0.1,
    0.15,
    0.2,
    0.3,
    0.5,
    0.75,
    1.0,
    2.5,
    5.0,
    10.0,
)
_COUNTS = tuple(float(f * 10**e) for e in range(6) for f in (1, 2, 5))
_SLOW = (0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 20.0, 30.0, 60.0, 120.0, 300.0)

METHODS = frozenset({"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"})
NO_PROCESS = -1
"""A process id that nobody has."""


class _EngineCollector(Collector):
    """Gauges and counters that the engine reports itself, read when scraped."""

    def __init__(self, engine: EngineClient, prefix: str) -> None:
        self._engine = engine
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        s, name = self._engine.stats, self._engine.plan.served_model_name
        used = s.kv_blocks_used / s.kv_blocks_total if s.kv_blocks_total else 0.0
        for key, text, value in (
            ("num_requests_running", "sequences that run", s.num_requests_running),
            ("num_requests_waiting", "sequences that wait", s.num_requests_waiting),
            ("kv_cache_usage_perc", "share of the KV blocks in use, 0 to 1", used),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        for key, text, value in (
            ("num_preemptions", "sequences preempted", s.num_preemptions),
            (
                "prompt_tokens",
                "prompt tokens computed, or found in the prefix cache",
                s.num_prompt_tokens,
            ),
            ("generation_tokens", "tokens generated", s.num_generation_tokens),
            ("spec_decode_num_draft_tokens", "draft tokens verified", s.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "draft tokens accepted", s.num_accepted_tokens),
            (
                "prefix_cache_queries",
                "prompt tokens looked for in the prefix cache",
                s.num_prefix_queried_tokens,
            ),
            (
                "prefix_cache_hits",
                "prompt tokens found in the prefix cache",
                s.num_prefix_hit_tokens,
            ),
            ("engine_steps", "steps run", s.num_steps),
            (
                "engine_failed_steps",
                "steps that failed, and their requests with them",
                s.num_failed_steps,
            ),
            ("engine_restarts", "engine processes replaced", self._engine.num_restarts),
        ):
            counter = CounterMetricFamily(self._prefix + key, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        yield from self._prefix_cache(s.num_prefix_evicted_blocks, s.num_prefix_blocks)
        yield from self._speculation(s)
        if self._engine.shadow is not None:
            yield from self._shadow(self._engine.shadow)

    def _speculation(self, s: EngineStats) -> Iterable[Metric]:
        """Of drafts; nothing where there is no drafter."""
        name, choice = self._engine.plan.served_model_name, self._engine.plan.choices["speculation"]
        if choice.is_empty:
            return
        num_drafts = s.drafted_by_position[0] if s.drafted_by_position else 0
        mean_length, per_step = (
            s.num_accepted_tokens / (num_drafts or 1),
            s.num_generation_tokens / (s.num_steps or 1),
        )
        for key, text, value in (
            (
                "spec_decode_mean_accepted_length",
                "draft tokens accepted of a draft, on average",
                mean_length,
            ),
            ("spec_decode_tokens_per_step", "tokens generated in a step, on average", per_step),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        seconds = CounterMetricFamily(
            self._prefix + "spec_decode_drafter_seconds",
            "seconds in the drafter, while the loop waits for it",
            labels=["model_name", "provider"],
        )
        seconds.add_metric([name, choice.qualified_name], s.draft_seconds)
        drafts = CounterMetricFamily(
            self._prefix + "spec_decode_num_drafts", "drafts verified", labels=["model_name"]
        )
        drafts.add_metric([name], num_drafts)
        yield from (seconds, drafts)
        for key, text, counts in (
            (
                "spec_decode_num_draft_tokens_per_pos",
                "draft tokens verified, by position",
                s.drafted_by_position,
            ),
            (
                "spec_decode_num_accepted_tokens_per_pos",
                "draft tokens accepted, by position",
                s.accepted_by_position,
            ),
        ):
            counter = CounterMetricFamily(
                self._prefix + key, text, labels=["model_name", "position"]
            )
            for position, count in enumerate(counts):
                counter.add_metric([name, str(position)], count)
            yield counter

    def _prefix_cache(self, evicted: dict[str, int], blocks: dict[str, int]) -> Iterable[Metric]:
        name, labels = self._engine.plan.served_model_name, ["model_name"]
        text = (
            "blocks that the prefix cache forgot (device_full, host_full, reset) or moved (to_host)"
        )
        counter = CounterMetricFamily(
            self._prefix + "prefix_cache_evicted_blocks", text, labels=[*labels, "cause"]
        )
        for cause, value in evicted.items():
            counter.add_metric([name, cause], value)
        yield counter
        text = "blocks that no sequence uses and that can be found again"
        gauge = GaugeMetricFamily(
            self._prefix + "prefix_cache_blocks", text, labels=[*labels, "tier"]
        )
        for tier, value in blocks.items():
            gauge.add_metric([name, tier], value)
        yield gauge

    def _shadow(self, report: ShadowReport) -> Iterable[Metric]:
        """Of candidates, by key of the plan and by layer."""
        name, choices = self._engine.plan.served_model_name, self._engine.plan.choices
        for key, text, value in (
            ("shadow_steps", "steps since the start of a shadow run", report.num_steps),
            ("shadow_sampled_steps", "steps that were compared", report.num_sampled_steps),
        ):
            counter = CounterMetricFamily(self._prefix + key, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        labels = ["model_name", "candidate", "provider"]
        off = GaugeMetricFamily(
            self._prefix + "shadow_switched_off", "1: it failed, and runs no more", labels=labels
        )
        for key, choice in choices.items():
            if key.startswith(SHADOW_PREFIX):
                off.add_metric([name, key, choice.qualified_name], key in report.failed)
        yield off
        for key, text, field in (
            ("shadow_max_abs_error", "largest difference from the trusted output", "max_abs_error"),
            (
                "shadow_max_relative_error",
                "the same, over the largest magnitude of that output",
                "max_rel_error",
            ),
            ("shadow_compared", "outputs compared", "num_compared"),
            ("shadow_speed", "of the candidate; the trusted provider's is 1", "speed"),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=[*labels, "layer"])
            for layer in report.layers:
                who = choices[layer.key].qualified_name
                gauge.add_metric([name, layer.key, who, layer.layer], getattr(layer, field))
            yield gauge


class Metrics:
    """What the server measures of its requests."""

    def __init__(self, engine: EngineClient, prefix: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, prefix))
        # Memory, CPU time and open files of both processes: process_… of this one, engine_process_…
        # of the other.
        ProcessCollector(registry=self.registry)
        ProcessCollector(
            namespace="engine", pid=lambda: engine.pid or NO_PROCESS, registry=self.registry
        )
        self._engine = engine
        name = engine.plan.served_model_name

        def histogram(key: str, text: str, buckets: tuple[float, ...]) -> Histogram:
            return Histogram(
                prefix + key, text, ["model_name"], registry=self.registry, buckets=buckets
            ).labels(name)

        self._ttft = histogram(
            "time_to_first_token_seconds", "from arrival to the first token", _FAST
        )
        self._queue = histogram(
            "request_queue_time_seconds", "from arrival in the engine to the first step", _FAST
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "from the first step to the first token", _FAST
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "between two deliveries of one request", _FAST
        )
        self._e2e = histogram("e2e_request_latency_seconds", "from arrival to the end", _SLOW)
        self._tpot = histogram(
            "request_time_per_output_token_seconds", "of a request, after its first token", _FAST
        )
        self._prompt = histogram("request_prompt_tokens", "prompt tokens of a request", _COUNTS)
        self._output = histogram(
            "request_generation_tokens", "tokens generated for a request, over its samples", _COUNTS
        )
        self._n = histogram("request_params_n", "samples asked for", (1, 2, 4, 8, 16, 32, 64, 128))
        self._max_tokens = histogram(
            "request_params_max_tokens", "most tokens asked for, a sample", _COUNTS
        )
        self._ended = Counter(
            prefix + "request_success",
            "requests by how they ended",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._answered = Counter(
            prefix + "http_requests",
            "answers by method, route and status",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self._name = name

    def answered(self, scope: Scope, status: int) -> None:
        """Count an answer that begins."""
        route = scope.get("route")  # None: refused before it was looked for, or there is none
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._answered.labels(method, getattr(route, "path", "none"), status).inc()

    async def observe(self, request: Request) -> AsyncGenerator[Delta]:
        """Run a request, measuring."""
        began = last = time.perf_counter()
        first = 0.0
        num_tokens, reason = 0, "abort"
        self._prompt.observe(len(request.prompt_token_ids))
        self._n.observe(request.params.n)
        self._max_tokens.observe(request.max_tokens)
        try:
            async with aclosing(self._engine.run(request)) as deltas:
                async for delta in deltas:
                    now = time.perf_counter()
                    if delta.token_ids:
                        (self._itl if num_tokens else self._ttft).observe(now - last)
                        num_tokens += len(delta.token_ids)
                        first, last = first or now, now
                    reason = delta.finish_reason or reason
                    if delta.times is not None and delta.index == 0:
                        self._queue.observe(delta.times.queue_seconds)
                        self._prefill.observe(delta.times.prefill_seconds)
                    yield delta
        except DovetailError:
            reason = "error"
            raise
        finally:
            self._e2e.observe(time.perf_counter() - began)
            self._output.observe(num_tokens)
            if num_tokens > 1 and last > first:
                self._tpot.observe((last - first) * request.params.n / num_tokens)
            self._ended.labels(self._name, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
