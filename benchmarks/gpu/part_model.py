"""The 8B Llama shape with random weights: decode steps of one and of many requests beside their
roofline, and how long the GPU idles."""

from __future__ import annotations

import itertools
import statistics
import time
from dataclasses import dataclass
from typing import Any

import torch
from rows import DRY, Row, Rows, copy_bandwidth, synchronize
from shapes import engine, kv_bytes, weight_bytes

from dovetail.engine.engine import Engine
from dovetail.types import Request, SamplingParams

CONTEXT = 40 if DRY else 1024
STEPS = 4 if DRY else 200
MANY = 3 if DRY else 256


def run(rows: Rows) -> None:
    bandwidth = copy_bandwidth()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    built = start(rows, MANY, CONTEXT + STEPS + 64)
    try:
        for count, goal in ((1, 0.85), (MANY, 0.75)):
            rows.attempt(
                f"decode of {count}",
                decode,
                rows,
                built,
                count,
                CONTEXT,
                STEPS,
                bandwidth,
                goal,
                seconds=180,
            )
        rows.attempt("idle", idle, rows, built, MANY, CONTEXT, seconds=120)
    finally:
        built.worker.close()


def memory_used() -> int:
    if DRY:
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free


def start(
    rows: Rows, max_num_seqs: int, max_model_len: int, what: str = "start", **more: Any
) -> Engine:
    """Build an engine; a row for each stage of its start says how long it took and what memory it
    left in use."""
    begin, stages = time.monotonic(), list[tuple[str, float, int]]()

    def progress(stage: str, done: int, total: int) -> None:
        if not stages or stages[-1][0] != stage:
            stages.append((stage, time.monotonic(), memory_used()))

    before = memory_used()
    built = engine(max_num_seqs, max_model_len, progress=progress, **more)
    synchronize()
    stages.append(("", time.monotonic(), memory_used()))
    for (stage, at, used), (_, until, later) in itertools.pairwise(stages):
        rows.add(
            Row(
                f"{what}: {stage}",
                until - at,
                "s",
                f"GPU memory {used / 2**20:.0f} to {later / 2**20:.0f} MiB",
            )
        )
        if stage.startswith("capturing"):
            rows.add(Row(f"{what}: memory taken by captured graphs", (later - used) / 2**20, "MiB"))
    rows.add(
        Row(
            f"{what}: in all",
            time.monotonic() - begin,
            "s",
            f"GPU memory before: {before / 2**20:.0f} MiB",
        )
    )
    rows.add(Row(f"{what}: blocks of the KV cache", built.snapshot().kv_blocks_total, "blocks"))
    return built


def prompt_of(length: int, seed: int) -> list[int]:
    return [(seed * 7919 + j * 31) % 400 + 3 for j in range(length)]


def begin(built: Engine, count: int, context: int, num_tokens: int) -> None:
    """Add requests and run steps until all prompts are computed."""
    params = SamplingParams(max_tokens=num_tokens)
    for i in range(count):
        built.add(
            Request(f"{count}-{context}-{i}", prompt_of(context, i), params, num_tokens, 0, [])
        )
    started: set[str] = set()
    while len(started) < count:
        started |= {output.request_id for output in step(built) if output.token_ids}


def step(built: Engine) -> list[Any]:
    """Outputs of one step. Raises if a request has failed."""
    outputs = built.step()
    for output in outputs:
        if output.error is not None:
            raise RuntimeError(f"{output.request_id}: {output.error}")
    return outputs


def finish(built: Engine) -> None:
    """Abort what runs, so that the next measurement begins with nothing."""
    for request_id in {seq.request.request_id for seq in built.sequences.values()}:
        built.abort(request_id)
    while built.has_work:
        built.step()


def decode(
    rows: Rows,
    built: Engine,
    count: int,
    context: int,
    steps: int,
    bandwidth: float,
    goal: float | None = None,
) -> None:
    """Median time of a step in which each of `count` requests gets a token."""
    try:
        start = time.perf_counter()
        begin(built, count, context, steps + 64)
        prefill, times = time.perf_counter() - start, []
        for _ in range(steps):
            start = time.perf_counter()
            step(built)
            times.append(time.perf_counter() - start)
    finally:
        finish(built)
    taken, what = statistics.median(times), f"decode step, {count} requests of {context}"
    least = (weight_bytes() + kv_bytes(count * (context + steps // 2))) / bandwidth
    rows.add(Row(what, taken * 1e3, "ms", "weights and KV at copy bandwidth", least / taken, goal))
    rows.add(
        Row(f"{what}: tokens", count / taken, "tok/s", f"slowest step {max(times) * 1e3:.2f} ms")
    )
    rows.add(Row(f"{what}: prompts", count * context / prefill, "tok/s", f"{prefill:.2f} s"))


@dataclass(frozen=True)
class Span:
    """A kernel or a copy, in microseconds."""

    name: str
    begin: float
    end: float


def profiled(built: Engine, steps: int) -> list[Span]:
    """What the GPU does in so many steps, in order. In a dry run, what the CPU does."""
    activity = torch.profiler.ProfilerActivity
    synchronize()
    with torch.profiler.profile(activities=[activity.CPU if DRY else activity.CUDA]) as profile:
        for _ in range(steps):
            step(built)
        synchronize()
        if DRY:  # whose worker computes in a thread that this does not see
            torch.ones(1).add(1)
    where = torch.autograd.DeviceType.CPU if DRY else torch.autograd.DeviceType.CUDA
    events = [e for e in profile.events() if e.device_type == where]
    if not events:
        raise RuntimeError("the profiler saw no kernel")
    return sorted(
        (Span(e.name, e.time_range.start, e.time_range.end) for e in events),
        key=lambda span: span.begin,
    )


def idle_share(spans: list[Span]) -> float:
    """Of the time between the first and the last of them, the part in which none runs."""
    busy, end = 0.0, spans[0].begin
    for span in spans:
        busy += max(0.0, span.end - max(span.begin, end))
        end = max(end, span.end)
    return 1 - busy / max(end - spans[0].begin, 1e-9)


def idle(rows: Rows, built: Engine, count: int, context: int) -> None:
    try:
        begin(built, count, context, 64)
        for _ in range(1 if DRY else 8):
            step(built)
        share = idle_share(profiled(built, 2 if DRY else 20))
    finally:
        finish(built)
    rows.add(
        Row(
            f"GPU idle in decode steps of {count} requests",
            100 * share,
            "%",
            "profiler",
            share,
            0.02,
            is_most=True,
        )
    )
