"""Export Prometheus metrics under vLLM's base names, so that dashboards can be reused. Each server
has its own registry."""

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
"""A process id that no process has."""


class _EngineCollector(Collector):
    """Gauges and counters that the engine reports, read at each scrape."""

    def __init__(self, engine: EngineClient, prefix: str) -> None:
        self._engine = engine
        self._prefix = prefix

    def collect(self) -> Iterable[Metric]:
        s, name = self._engine.stats, self._engine.plan.served_model_name
        used = s.kv_blocks_used / s.kv_blocks_total if s.kv_blocks_total else 0.0
        for key, text, value in (
            ("num_requests_running", "running sequences", s.num_requests_running),
            ("num_requests_waiting", "waiting sequences", s.num_requests_waiting),
            ("kv_cache_usage_perc", "fraction of KV blocks in use, 0 to 1", used),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        for key, text, value in (
            ("num_preemptions", "preemptions of sequences", s.num_preemptions),
            (
                "prompt_tokens",
                "prompt tokens computed or found in the prefix cache",
                s.num_prompt_tokens,
            ),
            ("generation_tokens", "tokens generated", s.num_generation_tokens),
            ("spec_decode_num_draft_tokens", "draft tokens verified", s.num_draft_tokens),
            ("spec_decode_num_accepted_tokens", "draft tokens accepted", s.num_accepted_tokens),
            (
                "prefix_cache_queries",
                "prompt tokens looked up in the prefix cache",
                s.num_prefix_queried_tokens,
            ),
            (
                "prefix_cache_hits",
                "prompt tokens found in the prefix cache",
                s.num_prefix_hit_tokens,
            ),
            ("engine_steps", "steps executed", s.num_steps),
            (
                "engine_failed_steps",
                "failed steps, each of which fails its requests",
                s.num_failed_steps,
            ),
            ("engine_restarts", "restarts of the engine process", self._engine.num_restarts),
        ):
            counter = CounterMetricFamily(self._prefix + key, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        yield from self._prefix_cache(s.num_prefix_evicted_blocks, s.num_prefix_blocks)
        yield from self._speculation(s)
        if self._engine.shadow is not None:
            yield from self._shadow(self._engine.shadow)

    def _speculation(self, s: EngineStats) -> Iterable[Metric]:
        """Return metrics of speculative decoding; none without a drafter."""
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
                "mean number of accepted tokens per draft",
                mean_length,
            ),
            ("spec_decode_tokens_per_step", "mean number of tokens generated per step", per_step),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=["model_name"])
            gauge.add_metric([name], value)
            yield gauge
        seconds = CounterMetricFamily(
            self._prefix + "spec_decode_drafter_seconds",
            "seconds that the engine loop waited for the drafter",
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
            "blocks that the prefix cache dropped (device_full, host_full, reset) or moved to host"
            " memory (to_host)"
        )
        counter = CounterMetricFamily(
            self._prefix + "prefix_cache_evicted_blocks", text, labels=[*labels, "cause"]
        )
        for cause, value in evicted.items():
            counter.add_metric([name, cause], value)
        yield counter
        text = "cached blocks that no sequence uses"
        gauge = GaugeMetricFamily(
            self._prefix + "prefix_cache_blocks", text, labels=[*labels, "tier"]
        )
        for tier, value in blocks.items():
            gauge.add_metric([name, tier], value)
        yield gauge

    def _shadow(self, report: ShadowReport) -> Iterable[Metric]:
        """Return metrics of shadow runs by candidate (its key in the plan) and layer."""
        name, choices = self._engine.plan.served_model_name, self._engine.plan.choices
        for key, text, value in (
            ("shadow_steps", "steps since the start of a shadow run", report.num_steps),
            ("shadow_sampled_steps", "steps whose outputs were compared", report.num_sampled_steps),
        ):
            counter = CounterMetricFamily(self._prefix + key, text, labels=["model_name"])
            counter.add_metric([name], value)
            yield counter
        labels = ["model_name", "candidate", "provider"]
        off = GaugeMetricFamily(
            self._prefix + "shadow_switched_off",
            "1 if the candidate failed and was disabled",
            labels=labels,
        )
        for key, choice in choices.items():
            if key.startswith(SHADOW_PREFIX):
                off.add_metric([name, key, choice.qualified_name], key in report.failed)
        yield off
        for key, text, field in (
            (
                "shadow_max_abs_error",
                "largest absolute difference from the trusted provider's output",
                "max_abs_error",
            ),
            (
                "shadow_max_relative_error",
                "largest absolute difference divided by the trusted output's largest magnitude",
                "max_rel_error",
            ),
            ("shadow_compared", "outputs compared", "num_compared"),
            ("shadow_speed", "speed of the candidate relative to the trusted provider", "speed"),
        ):
            gauge = GaugeMetricFamily(self._prefix + key, text, labels=[*labels, "layer"])
            for layer in report.layers:
                provider = choices[layer.key].qualified_name
                gauge.add_metric([name, layer.key, provider, layer.layer], getattr(layer, field))
            yield gauge


class Metrics:
    """The registry of one server, and the metrics that it measures per request."""

    def __init__(self, engine: EngineClient, prefix: str) -> None:
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(engine, prefix))
        # Memory, CPU time and open files of both processes: process_… for this one,
        # engine_process_… for the engine process.
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
            "time_to_first_token_seconds", "seconds from arrival to the first token", _FAST
        )
        self._queue = histogram(
            "request_queue_time_seconds",
            "seconds from arrival in the engine to the first step",
            _FAST,
        )
        self._prefill = histogram(
            "request_prefill_time_seconds", "seconds from the first step to the first token", _FAST
        )
        self._itl = histogram(
            "inter_token_latency_seconds", "seconds between two deliveries of one request", _FAST
        )
        self._e2e = histogram(
            "e2e_request_latency_seconds", "seconds from arrival to completion", _SLOW
        )
        self._tpot = histogram(
            "request_time_per_output_token_seconds",
            "mean seconds per token of a request after its first token",
            _FAST,
        )
        self._prompt = histogram("request_prompt_tokens", "prompt tokens per request", _COUNTS)
        self._output = histogram(
            "request_generation_tokens",
            "generated tokens per request, all samples together",
            _COUNTS,
        )
        self._n = histogram(
            "request_params_n", "requested number of samples", (1, 2, 4, 8, 16, 32, 64, 128)
        )
        self._max_tokens = histogram(
            "request_params_max_tokens", "requested maximum number of tokens per sample", _COUNTS
        )
        self._finished = Counter(
            prefix + "request_success",
            "finished requests by reason",
            ["model_name", "finished_reason"],
            registry=self.registry,
        )
        self._responses = Counter(
            prefix + "http_requests",
            "HTTP responses by method, route and status",
            ["method", "handler", "status"],
            registry=self.registry,
        )
        self._name = name

    def count_response(self, scope: Scope, status: int) -> None:
        """Count a response whose head is about to be sent."""
        route = scope.get("route")  # None if rejected before routing, or not found
        method = scope["method"] if scope["method"] in METHODS else "other"
        self._responses.labels(method, getattr(route, "path", "none"), status).inc()

    async def observe(self, request: Request) -> AsyncGenerator[Delta]:
        """Run a request and record its metrics."""
        start = last = time.perf_counter()
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
            self._e2e.observe(time.perf_counter() - start)
            self._output.observe(num_tokens)
            if num_tokens > 1 and last > first:
                self._tpot.observe((last - first) * request.params.n / num_tokens)
            self._finished.labels(self._name, reason).inc()

    def text(self) -> bytes:
        return generate_latest(self.registry)
