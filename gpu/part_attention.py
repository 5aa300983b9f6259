"""Attention of every provider for GPUs that is usable, on one layer: decode and prefill, in bytes and operations a second."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from rows import DEVICE, DRY, INTERPRETED, Row, Rows, captured, copy_bandwidth, matrix_rate, seconds

from dovetail.facts import device_facts
from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec
from dovetail.plugins.discovery import load_registry
from dovetail.provider import Context

BLOCK = 16
HQ, HKV, D = (4, 2, 64) if DRY else (32, 8, 128)
DECODE = ((2, 50),) if DRY else ((1, 32768), (8, 8192), (32, 4096), (32, 32768), (64, 8192), (256, 1024), (256, 4096))
"""Rows, and tokens of each."""
PREFILL = (40,) if DRY else (4096, 8192, 16384)
SIZES = {"float8_e4m3fn": 1, "int8": 1, "bfloat16": 2}


@dataclass
class Case:
    """A step on one layer: `computed` and `new` tokens by row."""

    computed: list[int]
    new: list[int]
    kv_dtype: str = "bfloat16"

    @property
    def lens(self) -> list[int]:
        return [a + b for a, b in zip(self.computed, self.new, strict=True)]

    @property
    def kv_bytes(self) -> int:
        return sum(self.lens) * 2 * HKV * D * SIZES[self.kv_dtype]

    @property
    def operations(self) -> float:
        """Of the products under the causal mask."""
        return sum(4 * HQ * D * (n * c + n * (n + 1) / 2) for c, n in zip(self.computed, self.new, strict=True))


def run(rows: Rows) -> None:
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    rows.add(Row("bfloat16 matrix product", rate / 1e12, "TFLOP/s"))
    backends = usable()
    for batch, context in DECODE:
        decode(rows, backends, batch, context, bandwidth)
    for length in PREFILL:
        prefill(rows, backends, length, rate)


def usable() -> dict[str, Any]:
    """Backends by name, each as the engine builds it."""
    context = Context(device_facts(), None, "cpu" if DRY else "cuda:0", "bfloat16")
    found = {}
    for offer in load_registry().of("attention"):
        provider = offer.provider
        if "cuda" not in provider.capabilities.devices or provider.priority <= 0 or provider.why_not(context):
            continue
        if DRY and provider.name not in INTERPRETED:
            continue
        plan: Any = type("P", (), {"device": str(DEVICE)})
        build: Any = type("C", (), {"plan": plan, "device": device_facts()})
        found[provider.name] = (provider.build(build, provider.options()), provider.capabilities)
    return found


def step_of(case: Case, backend: Any) -> tuple[Any, ...]:
    """Everything that `run` takes, over a cache whose blocks are shuffled."""
    counts = [-(-n // BLOCK) for n in case.lens]
    ids = list(range(1, 1 + sum(counts)))
    random.Random(0).shuffle(ids)
    table = torch.zeros(len(counts), max(counts), dtype=torch.int32)
    for b, count in enumerate(counts):
        table[b, :count] = torch.tensor([ids.pop() for _ in range(count)])
    starts = [0]
    for n in case.new:
        starts.append(starts[-1] + n)
    slots = [
        int(table[b, p // BLOCK]) * BLOCK + p % BLOCK for b, c in enumerate(case.computed) for p in range(c, case.lens[b])
    ]  # fmt: skip

    def on(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(DEVICE)

    batch = AttentionBatch(
        on(starts, torch.int32), on(case.lens, torch.int32), table.to(DEVICE), on(slots, torch.int64), starts, case.lens,
        len(counts), starts[-1], max(case.new), max(case.lens),
    )  # fmt: skip
    scales = on([0.02, 0.02], torch.float32) if SIZES[case.kv_dtype] == 1 else None
    # What is run is the second layer: the first may do work of the step.
    first, layer = (AttentionLayer(i, HQ, HKV, D, D**-0.5, kv_scales=scales) for i in range(2))
    cache = backend.allocate_cache(KVCacheSpec(1 + sum(counts), BLOCK, HKV, D, case.kv_dtype))
    q, k, v = (torch.randn(starts[-1], h, D, device=DEVICE).to(torch.bfloat16) for h in (HQ, HKV, HKV))
    return layer, q, k, v, cache, backend.plan(batch, [first, layer], BLOCK), torch.empty_like(q)


def decode(rows: Rows, backends: dict[str, Any], batch: int, context: int, bandwidth: float) -> None:
    what, times = f"decode, {batch} rows of {context}", dict[str, float]()
    for name, (backend, can) in backends.items():
        for kv_dtype in ("bfloat16", "float8_e4m3fn", "int8"):
            if kv_dtype not in can.kv_dtypes:
                continue
            case = Case([context - 1] * batch, [1] * batch, kv_dtype)
            step = step_of(case, backend)
            taken = seconds(captured(lambda step=step, backend=backend: backend.run(*step)))
            goal = 0.85 if kv_dtype == "bfloat16" and batch >= 32 and context >= 4096 else None
            rows.add(Row(f"{what}: {name}, {kv_dtype}", taken * 1e6, "µs", "copy", case.kv_bytes / taken / bandwidth, goal))
            if kv_dtype == "bfloat16":
                times[name] = taken
            elif name in times:
                ratio = taken / times[name]
                rows.add(Row(f"{what}: {name}, {kv_dtype} to bfloat16", taken * 1e6, "µs", "time", ratio, 0.58, is_most=True))
            del step
    q = torch.randn(batch, HQ, 1, D, device=DEVICE).to(torch.bfloat16)
    k, v = (torch.randn(batch, HKV, context, D, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    taken = seconds(captured(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))
    beside(rows, what, times, taken, 1.0)


def prefill(rows: Rows, backends: dict[str, Any], length: int, rate: float) -> None:
    what, times, case = f"prefill of {length}", dict[str, float](), Case([0], [length])
    for name, (backend, _) in backends.items():
        step = step_of(case, backend)
        times[name] = taken = seconds(lambda step=step, backend=backend: backend.run(*step))
        rows.add(Row(f"{what}: {name}", taken * 1e6, "µs", "bf16 GEMM", case.operations / taken / rate, 0.55))
    q = torch.randn(1, HQ, length, D, device=DEVICE).to(torch.bfloat16)
    k, v = (torch.randn(1, HKV, length, D, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    taken = seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    beside(rows, what, times, taken, 0.9)


def beside(rows: Rows, what: str, times: dict[str, float], sdpa: float, goal: float) -> None:
    """Ours beside the best of the others: FlashInfer, PyTorch's own over contiguous keys and values."""
    rows.add(Row(f"{what}: torch", sdpa * 1e6, "µs", "scaled_dot_product_attention, nothing paged"))
    peers = {"torch": sdpa, **{n: t for n, t in times.items() if n == "flashinfer"}}
    best = min(peers, key=lambda n: peers[n])
    for name, taken in times.items():
        if name not in peers:
            rows.add(Row(f"{what}: {name} beside {best}", taken * 1e6, "µs", "speed", peers[best] / taken, goal))
