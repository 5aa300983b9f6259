"""The 8B Llama shape with random weights: decode steps of one and of many requests beside their roofline, and how the GPU
idles."""

from __future__ import annotations

import statistics
import time

import torch
from rows import DRY, Row, Rows, copy_bandwidth
from shapes import engine, kv_bytes, weight_bytes

from dovetail.engine import Engine
from dovetail.types import Request, SamplingParams

CONTEXT = 40 if DRY else 1024
STEPS = 6 if DRY else 200


def run(rows: Rows) -> None:
    bandwidth = copy_bandwidth()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    many = 3 if DRY else 256
    start = time.monotonic()
    built = engine(many, CONTEXT + STEPS + 64)
    rows.add(Row("start: weights made, memory profiled, graphs captured", time.monotonic() - start, "s"))
    try:
        for count, goal in ((1, 0.85), (many, 0.75)):
            taken = decode_seconds(built, count)
            least = (weight_bytes() + kv_bytes(count * (CONTEXT + STEPS // 2))) / bandwidth
            what = f"decode step, {count} requests of {CONTEXT}"
            rows.add(Row(what, taken * 1e3, "ms", "weights and KV at copy bandwidth", least / taken, goal))
            rows.add(Row(f"{what}: tokens", count / taken, "tok/s"))
        if not DRY:
            idle(rows, built, many)
    finally:
        built.worker.close()


def begin(built: Engine, count: int, num_tokens: int) -> None:
    """Requests whose prompts are computed."""
    params = SamplingParams(max_tokens=num_tokens)
    for i in range(count):
        prompt = [(i * 7919 + j * 31) % 400 + 3 for j in range(CONTEXT)]
        built.add(Request(f"{count}-{i}", prompt, params, num_tokens, 0, []))
    said = 0
    while said < count:
        said += sum(bool(output.token_ids) for output in built.step())


def decode_seconds(built: Engine, count: int) -> float:
    """Median of a step in which each of `count` requests gets a token."""
    begin(built, count, STEPS + 32)
    times = []
    for _ in range(STEPS):
        start = time.perf_counter()
        built.step()
        times.append(time.perf_counter() - start)
    while built.has_work:
        for output in built.step():
            assert output.error is None, output.error
    return statistics.median(times)


def idle(rows: Rows, built: Engine, count: int) -> None:
    """Between the first and the last kernel of some steps: the time in which none runs."""
    begin(built, count, 64)
    for _ in range(8):
        built.step()
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        for _ in range(20):
            built.step()
        torch.cuda.synchronize()
    spans = sorted(
        (e.time_range.start, e.time_range.end) for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA
    )  # fmt: skip
    busy, end = 0.0, spans[0][0]
    for begun, ended in spans:
        busy += max(0.0, ended - max(begun, end))
        end = max(end, ended)
    total = end - spans[0][0]
    share = 1 - busy / total
    rows.add(Row(f"GPU idle in decode steps of {count} requests", 100 * share, "%", "profiler", share, 0.02, is_most=True))
    while built.has_work:
        built.step()
