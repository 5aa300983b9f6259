"""The 8B Llama shape with random weights: how it starts, how fast it decodes, and what the GPU does
in three kinds of steps."""

from __future__ import annotations

from collections import defaultdict

from part_model import Span, begin, decode, finish, idle_share, profiled, prompt_of, start, step
from part_throughput import mixed_requests, ours_per_second
from rows import DRY, Row, Rows, copy_bandwidth

from dovetail.engine.engine import Engine
from dovetail.types import Request, SamplingParams

MANY = 3 if DRY else 256
CONTEXT, LONG = (20, 60) if DRY else (512, 8192)
STEPS = 2 if DRY else 40
TOP = 15
NUM_REQUESTS = 3 if DRY else 200
WAYS = ({}, {"execution": "plain"})
"""Options of the worker; the next ones are taken if an engine cannot be built with the ones
before."""


def run(rows: Rows) -> None:
    bandwidth = copy_bandwidth()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    engines: list[Engine] = []

    def build(worker: dict[str, str], label: str) -> None:
        engines.append(start(rows, MANY, LONG + 1024 if not DRY else 128, label, worker=worker))

    for worker in WAYS:
        label = "start" if not worker else f"start with {worker}"
        if not engines:
            rows.attempt(label, build, worker, label, seconds=70)
    if not engines:
        return
    (built,) = engines
    for count in (1, 2) if DRY else (1, 32, MANY):
        rows.attempt(
            f"decode of {count}", decode, rows, built, count, CONTEXT, STEPS, bandwidth, seconds=40
        )
    rows.attempt(
        f"profile of a decode step of {MANY}", decode_profile, rows, built, MANY, seconds=40
    )
    rows.attempt("profile of a decode step of 1", decode_profile, rows, built, 1, seconds=30)
    rows.attempt(f"profile of a prompt of {LONG}", prompt_profile, rows, built, seconds=30)
    rows.attempt("profile of a mixed step", mixed_profile, rows, built, seconds=30)
    rows.attempt(f"{NUM_REQUESTS} requests", requests, rows, built, seconds=60)


def top(rows: Rows, what: str, spans: list[Span], steps: int) -> None:
    """The kernels that take most of the time, per step."""
    times: dict[str, list[float]] = defaultdict(list)
    for span in spans:
        times[span.name].append(span.end - span.begin)
    total = sum(map(sum, times.values()))
    share = idle_share(spans)
    rows.add(
        Row(
            f"{what}: GPU idle",
            100 * share,
            "%",
            f"{len(spans) / steps:.0f} launches a step",
            share,
        )
    )
    rows.add(Row(f"{what}: kernels in all", total / steps, "µs"))
    for name, taken in sorted(times.items(), key=lambda item: -sum(item[1]))[:TOP]:
        about = f"{len(taken) / steps:.1f} times a step, {sum(taken) / len(taken):.1f} µs each"
        rows.add(
            Row(
                f"{what}: {name[:100]}",
                sum(taken) / steps,
                "µs",
                about,
                sum(taken) / max(total, 1e-9),
            )
        )


def decode_profile(rows: Rows, built: Engine, count: int) -> None:
    try:
        begin(built, count, CONTEXT, 64)
        for _ in range(1 if DRY else 4):
            step(built)
        steps = 2 if DRY else 8
        top(rows, f"decode step of {count}", profiled(built, steps), steps)
    finally:
        finish(built)


def prompt_profile(rows: Rows, built: Engine) -> None:
    """A step that computes nothing but one long prompt. The second one: the first may compile."""
    try:
        for i in range(2):
            built.add(
                Request(f"long-{i}", prompt_of(LONG, i), SamplingParams(max_tokens=1), 1, 0, [])
            )
            spans = profiled(
                built, 2
            )  # the first of them submits the step, the second waits for it
            finish(built)
        top(rows, f"step of {LONG} prompt tokens", spans, 1)
    finally:
        finish(built)


def mixed_profile(rows: Rows, built: Engine) -> None:
    """Decoding requests beside a chunk of a prompt that has just come."""
    count = 2 if DRY else 32
    try:
        begin(built, count, CONTEXT, 64)
        for i in range(2):
            built.add(
                Request(
                    f"joins-{i}", prompt_of(LONG // 4, i), SamplingParams(max_tokens=4), 4, 0, []
                )
            )
            spans = profiled(built, 1)
            for _ in range(6):
                step(built)
        top(rows, f"step of {count} decoding requests and {LONG // 4} prompt tokens", spans, 1)
    finally:
        finish(built)


def requests(rows: Rows, built: Engine) -> None:
    found = mixed_requests(NUM_REQUESTS)
    rows.add(
        Row(
            f"{NUM_REQUESTS} requests of mixed lengths: tokens generated",
            ours_per_second(built, found),
            "tok/s",
        )
    )
