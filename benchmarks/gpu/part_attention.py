"""Attention by every usable provider for GPUs, on one layer: decode and prefill, in bytes and
operations a second."""

from __future__ import annotations

import random
from dataclasses import dataclass
from typing import Any

import providers
import torch
import torch.nn.functional as F
from rows import DEVICE, DRY, Row, Rows, captured, copy_bandwidth, matrix_rate, randn, seconds

from dovetail.interfaces.attention import AttentionBatch, AttentionLayer, KVCacheSpec

BLOCK = 16
HQ, HKV, D = (4, 2, 64) if DRY else (32, 8, 128)
DECODE = (
    ((2, 50),)
    if DRY
    else ((1, 32768), (8, 8192), (32, 4096), (32, 32768), (64, 8192), (256, 1024), (256, 4096))
)
"""Rows, and tokens of each."""
PREFILL = (40,) if DRY else (4096, 8192, 16384)
BLOCKS_AT_A_TIME = 8192
"""That are filled with random numbers."""
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
        return sum(
            4 * HQ * D * (n * c + n * (n + 1) / 2)
            for c, n in zip(self.computed, self.new, strict=True)
        )


def run(rows: Rows) -> None:
    bandwidth, rate = copy_bandwidth(), matrix_rate()
    rows.add(Row("device copy, read and written", bandwidth / 1e9, "GB/s"))
    rows.add(Row("bfloat16 matrix product", rate / 1e12, "TFLOP/s"))
    backends = usable(rows)
    for batch, context in DECODE:
        rows.attempt(
            f"decode of {batch} × {context}", decode, rows, backends, batch, context, bandwidth
        )
    for length in PREFILL:
        rows.attempt(f"prefill of {length}", prefill, rows, backends, length, rate)


def usable(rows: Rows) -> dict[str, Any]:
    """Backends by name with what their providers declare, the preferred one first."""
    found: dict[str, Any] = {}
    for name, provider in providers.usable("attention").items():
        if provider.priority > 0:
            try:
                found[name] = (providers.build(provider), provider.capabilities)
            except Exception as e:
                rows.failed(f"{name}: build", e)
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
        int(table[b, p // BLOCK]) * BLOCK + p % BLOCK
        for b, c in enumerate(case.computed)
        for p in range(c, case.lens[b])
    ]

    def on(values: Any, dtype: torch.dtype) -> torch.Tensor:
        return torch.as_tensor(values, dtype=dtype).to(DEVICE)

    batch = AttentionBatch(
        on(starts, torch.int32),
        on(case.lens, torch.int32),
        table.to(DEVICE),
        on(slots, torch.int64),
        starts,
        case.lens,
        len(counts),
        starts[-1],
        max(case.new),
        max(case.lens),
    )
    scales = on([0.02, 0.02], torch.float32) if SIZES[case.kv_dtype] == 1 else None
    # What is run is the second layer: the first may do work of the step.
    first, layer = (AttentionLayer(i, HQ, HKV, D, D**-0.5, kv_scales=scales) for i in range(2))
    cache = backend.allocate_cache(KVCacheSpec(1 + sum(counts), BLOCK, HKV, D, case.kv_dtype))
    fill(backend, cache, 1 + sum(counts), getattr(torch, case.kv_dtype))
    q, k, v = (randn(starts[-1], heads, D) for heads in (HQ, HKV, HKV))
    return layer, q, k, v, cache, backend.plan(batch, [first, layer], BLOCK), torch.empty_like(q)


def fill(backend: Any, cache: Any, num_blocks: int, dtype: torch.dtype) -> None:
    """With random numbers: zeros would be multiplied faster."""
    spread = 50 if dtype.itemsize == 1 else 1
    for first in range(0, num_blocks, BLOCKS_AT_A_TIME):
        ids = list(range(first, min(first + BLOCKS_AT_A_TIME, num_blocks)))
        keys, values = (
            torch.randn(len(ids), BLOCK, HKV, D, device=DEVICE).mul_(spread).to(dtype)
            for _ in range(2)
        )
        backend.import_kv(cache, ids, keys, values)


def decode(
    rows: Rows, backends: dict[str, Any], batch: int, context: int, bandwidth: float
) -> None:
    what, times = f"decode, {batch} rows of {context}", dict[str, float]()
    for name, (backend, can) in backends.items():
        for kv_dtype in ("bfloat16", "float8_e4m3fn", "int8"):
            if kv_dtype in can.kv_dtypes:
                label = f"{what}: {name}, {kv_dtype}"
                try:
                    decode_of(
                        rows,
                        label,
                        backend,
                        Case([context - 1] * batch, [1] * batch, kv_dtype),
                        bandwidth,
                        times,
                        name,
                    )
                except Exception as e:
                    rows.failed(label, e)
    taken = torch_decode(batch, context)
    beside(rows, what, times, taken, 1.0)


def decode_of(
    rows: Rows,
    label: str,
    backend: Any,
    case: Case,
    bandwidth: float,
    times: dict[str, float],
    name: str,
) -> None:
    step = step_of(case, backend)
    taken = seconds(captured(lambda: backend.run(*step)))
    is_plain = case.kv_dtype == "bfloat16"
    goal = 0.85 if is_plain and len(case.new) >= 32 and case.lens[0] >= 4096 else None
    rows.add(Row(label, taken * 1e6, "µs", "copy", case.kv_bytes / taken / bandwidth, goal))
    if is_plain:
        times[name] = taken
    elif name in times:
        rows.add(
            Row(
                f"{label} to bfloat16",
                taken * 1e6,
                "µs",
                "time",
                taken / times[name],
                0.58,
                is_most=True,
            )
        )


def prefill(rows: Rows, backends: dict[str, Any], length: int, rate: float) -> None:
    what, times, case = f"prefill of {length}", dict[str, float](), Case([0], [length])
    for name, (backend, _) in backends.items():
        try:
            step = step_of(case, backend)
            times[name] = taken = seconds(lambda step=step, backend=backend: backend.run(*step))
        except Exception as e:
            rows.failed(f"{what}: {name}", e)
            continue
        rows.add(
            Row(
                f"{what}: {name}",
                taken * 1e6,
                "µs",
                "bf16 GEMM",
                case.operations / taken / rate,
                0.55,
            )
        )
    beside(rows, what, times, torch_prefill(length), 0.9)


def torch_decode(batch: int, context: int) -> float:
    """Seconds of PyTorch's own attention, over contiguous keys and values."""
    q, k, v = randn(batch, HQ, 1, D), randn(batch, HKV, context, D), randn(batch, HKV, context, D)
    return seconds(captured(lambda: F.scaled_dot_product_attention(q, k, v, enable_gqa=True)))


def torch_prefill(length: int) -> float:
    q, k, v = randn(1, HQ, length, D), randn(1, HKV, length, D), randn(1, HKV, length, D)
    return seconds(lambda: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))


def beside(rows: Rows, what: str, times: dict[str, float], sdpa: float, goal: float | None) -> None:
    """Ours beside the faster of FlashInfer and PyTorch's own."""
    rows.add(Row(f"{what}: torch", sdpa * 1e6, "µs", "scaled_dot_product_attention, nothing paged"))
    peers = {"torch": sdpa, **{n: t for n, t in times.items() if n == "flashinfer"}}
    best = min(peers, key=lambda n: peers[n])
    for name, taken in times.items():
        if name not in peers:
            rows.add(
                Row(
                    f"{what}: {name} beside {best}",
                    taken * 1e6,
                    "µs",
                    "speed",
                    peers[best] / taken,
                    goal,
                )
            )
