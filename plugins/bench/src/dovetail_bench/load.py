"""Generate load for an engine in this process: prompts of random tokens at a fixed concurrency."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from dovetail.facts import model_facts
from dovetail.frontend.outputs import RequestState
from dovetail.frontend.requests import RequestMaker
from dovetail.runtime.llm import LLM
from dovetail.types import SamplingParams, SequenceOutput

Figures = dict[str, float]
"""Measured values by name. The name includes the unit: `{"output tokens/s": 812.0, "ITL p50 ms":
4.1}`."""


@dataclass(frozen=True)
class Work:
    """The work of one round: `num_requests` requests, `concurrency` of them at a time. Lengths are
    in tokens."""

    input_len: int
    output_len: int
    num_requests: int
    concurrency: int

    def prompts(self, seed: int, vocab_size: int) -> list[list[int]]:
        """Return the prompts of a round. Rounds have different prompts, so a prefix cache does not
        help."""
        return [
            prompt_of(self.input_len, 1000 * seed + i, vocab_size) for i in range(self.num_requests)
        ]


def prompt_of(length: int, seed: int, vocab_size: int) -> list[int]:
    """Return random token ids, excluding the lowest ones, which include special tokens."""
    rng = random.Random(seed)
    return [rng.randrange(min(300, vocab_size - 1), vocab_size) for _ in range(length)]


class Clock:
    """Records when each request began and when its tokens arrived, in seconds of
    `time.perf_counter`."""

    def __init__(self) -> None:
        self.ttft: list[float] = []
        self.gaps: list[float] = []
        self._last: dict[str, tuple[float, bool]] = {}
        """For each request, the time of its start or last token, and whether it has any token."""

    def began(self, request_id: str, now: float) -> None:
        self._last[request_id] = (now, False)

    def token(self, request_id: str, now: float) -> None:
        before, started = self._last[request_id]
        (self.gaps if started else self.ttft).append(now - before)
        self._last[request_id] = (now, True)

    def figures(self) -> Figures:
        return waits(self.ttft, self.gaps)


def waits(ttft: Sequence[float], gaps: Sequence[float]) -> Figures:
    """Return percentiles in ms of times in seconds: to the first token of each request, and between
    tokens."""
    return {
        "TTFT p50 ms": 1e3 * percentile(ttft, 0.5),
        "TTFT p99 ms": 1e3 * percentile(ttft, 0.99),
        "ITL p50 ms": 1e3 * percentile(gaps, 0.5),
        "ITL p99 ms": 1e3 * percentile(gaps, 0.99),
    }


def percentile(values: Sequence[float], share: float) -> float:
    """Return the value that a `share` of all values do not exceed, or 0 if there are none."""
    return sorted(values)[int(share * (len(values) - 1))] if values else 0.0


class ClosedLoop:
    """Runs requests in an engine in this process. When one ends, the next begins.

    A step consists of `feed`, which adds requests, the engine's step, and `text`, which detokenizes
    its outputs.
    """

    def __init__(
        self, llm: LLM, prompts: Iterable[list[int]], output_len: int, concurrency: int
    ) -> None:
        self.clock = Clock()
        self.num_tokens = 0
        self._engine = llm.engine
        self._tokenizer = llm.tokenizer
        self._maker = RequestMaker(
            model_facts(Path(llm.plan.folder)), llm.plan.max_model_len, llm.tokenizer
        )
        self._params = SamplingParams(max_tokens=output_len, temperature=0, ignore_eos=True)
        self._concurrency = concurrency
        self._prompts = list(reversed(list(prompts)))
        self._live: dict[str, RequestState] = {}

    @property
    def busy(self) -> bool:
        return bool(self._prompts or self._live)

    def run(self) -> float:
        """Run until all requests have finished. Returns the duration in seconds."""
        began = time.perf_counter()
        while self.busy:
            self.step()
        seconds = time.perf_counter() - began
        while self._engine.has_work:  # the overlapped loop may have a step in flight
            self._engine.step()
        return seconds

    def step(self) -> None:
        self.feed()
        self.text(self._engine.step())

    def feed(self) -> None:
        engine = self._engine
        while (
            self._prompts
            and len(self._live) < self._concurrency
            and len(engine.scheduler.waiting) < engine.max_num_waiting
        ):
            request = self._maker.make(self._prompts.pop(), self._params)
            self._live[request.request_id] = RequestState(request, self._tokenizer)
            self.clock.began(request.request_id, time.perf_counter())
            engine.add(request)

    def text(self, outputs: list[SequenceOutput]) -> None:
        """Convert outputs to text and record their times. Raises the engine's error if a request
        failed."""
        now = time.perf_counter()
        for output in outputs:
            state = self._live[output.request_id]
            delta, _ = state.push(output)
            if delta is not None and delta.token_ids:
                self.num_tokens += len(delta.token_ids)
                self.clock.token(output.request_id, now)
            if state.finished:
                del self._live[output.request_id]


def throughput_round(llm: LLM, work: Work, seed: int) -> Figures:
    """Measure output tokens per second, prefill included, and the latencies of tokens."""
    loop = ClosedLoop(
        llm, work.prompts(seed, min(4000, llm.vocab_size)), work.output_len, work.concurrency
    )
    before = llm.engine.stats.num_steps
    seconds = loop.run()
    return {
        "output tokens/s": loop.num_tokens / seconds,
        "total tokens/s": (loop.num_tokens + work.num_requests * work.input_len) / seconds,
        "ms a step": 1e3 * seconds / (llm.engine.stats.num_steps - before),
        **loop.clock.figures(),
    }


def latency_round(llm: LLM, work: Work, seed: int) -> Figures:
    """Measure one request: time to first token, then decode speed."""
    loop = ClosedLoop(llm, work.prompts(seed, min(4000, llm.vocab_size)), work.output_len, 1)
    loop.run()
    mean = statistics.fmean(loop.clock.gaps) if loop.clock.gaps else 0.0
    return {"TTFT ms": 1e3 * loop.clock.ttft[0], "decode tokens/s": 1 / mean if mean else 0.0}
