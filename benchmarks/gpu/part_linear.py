"""Products by quantized weights on the layers of an 8B Llama, each beside the same product in
bfloat16."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import providers
import torch
import torch.nn.functional as F
from providers import F8
from rows import DEVICE, DRY, Row, Rows, captured, randn, seconds

from dovetail.interfaces.matmul import WeightFormat
from dovetail.interfaces.quantization import LinearLayer, Part

LAYERS = (
    {"qkv": (48, 64), "down": (64, 128)}
    if DRY
    else {"qkv": (6144, 4096), "o": (4096, 4096), "gate_up": (28672, 4096), "down": (4096, 14336)}
)
"""Outputs and inputs."""
NUM_ROWS = (1, 5) if DRY else (1, 16, 64, 512, 4096)
COLD_BYTES = 2**16 if DRY else 2**28
"""Weights that products take in turn, so that none is in the second cache."""


@dataclass(frozen=True)
class Measured:
    name: str
    format: WeightFormat
    goals: dict[int, float]
    """Speed beside bfloat16, by number of rows."""


FORMATS = (
    Measured(
        "W4A16 in groups of 128",
        WeightFormat("uint4", 128),
        {1: 3.3, 16: 2.8, 512: 0.97, 4096: 0.97},
    ),
    Measured("W4A16 in groups of 128, with zeros", WeightFormat("uint4", 128, zeros=True), {}),
    Measured("FP8 W8A8", WeightFormat(F8, inputs=F8), {1: 1.8, 16: 1.8, 64: 1.8, 4096: 1.5}),
    Measured("FP8 W8A8 in groups of 128", WeightFormat(F8, 128, inputs=F8), {}),
    Measured("INT8 W8A8", WeightFormat("int8", inputs="int8"), {}),
    Measured("INT8 W8A16", WeightFormat("int8"), {}),
    Measured("FP8 W8A16", WeightFormat(F8), {}),
)


def run(rows: Rows) -> None:
    """Sums over the four layers come last: what a decoder's layer takes in all."""
    totals = measure(rows, LAYERS, FORMATS, NUM_ROWS)
    for one in FORMATS:
        for count in NUM_ROWS:
            if (one.name, count) in totals and ("bfloat16", count) in totals:
                what = f"all layers, {count} rows: {one.name}"
                add(
                    rows,
                    what,
                    totals[one.name, count],
                    totals["bfloat16", count],
                    one.goals.get(count),
                )


def measure(
    rows: Rows,
    layers: dict[str, tuple[int, int]],
    formats: Sequence[Measured],
    num_rows: Sequence[int],
) -> dict[tuple[str, int], float]:
    """Seconds over all layers, by format and number of rows, without those of which a layer could
    not be measured."""
    matmul, found = provided(), dict[tuple[str, int], dict[str, float]]()

    def plain(name: str, outs: int, ins: int) -> None:
        weights = [randn(outs, ins) for _ in range(copies(outs * ins * 2))]
        for count in num_rows:
            taken = timed([lambda x, w=w: F.linear(x, w) for w in weights], ins, count)
            rate = 2 * outs * ins * count / taken / 1e12
            rows.add(
                Row(
                    f"{name} [{outs}, {ins}], {count} rows: bfloat16",
                    taken * 1e6,
                    "µs",
                    f"{rate:.3g} TFLOP/s",
                )
            )
            found.setdefault(("bfloat16", count), {})[name] = taken

    def quantized(name: str, outs: int, ins: int, one: Measured) -> None:
        size = outs * ins * one.format.bits // 8
        products = [random_linear(matmul, one.format, outs, ins) for _ in range(copies(size))]
        for count in num_rows:
            taken = timed(products, ins, count)
            peer = found.get(("bfloat16", count), {}).get(name)
            add(rows, f"{name}, {count} rows: {one.name}", taken, peer, one.goals.get(count))
            found.setdefault((one.name, count), {})[name] = taken

    for name, (outs, ins) in layers.items():
        rows.attempt(f"{name}: bfloat16", plain, name, outs, ins)
        for one in formats:
            rows.attempt(f"{name}: {one.name}", quantized, name, outs, ins, one)
    return {key: sum(times.values()) for key, times in found.items() if len(times) == len(layers)}


def add(rows: Rows, what: str, taken: float, plain: float | None, goal: float | None) -> None:
    ratio = None if plain is None else plain / taken
    rows.add(Row(what, taken * 1e6, "µs", "speed beside bfloat16", ratio, goal))


def provided() -> Any:
    """What the engine would multiply by."""
    return providers.build(next(iter(providers.usable("matmul", inputs=("int8", F8)).values())))


def copies(size: int) -> int:
    return 1 if DRY else max(1, min(16, COLD_BYTES // size))


def timed(products: list[Callable[[torch.Tensor], torch.Tensor]], ins: int, count: int) -> float:
    """Seconds of one, each on weights that no other has just read."""
    x = randn(count, ins)

    def all_in_turn() -> None:
        for product in products:
            product(x)

    return seconds(captured(all_in_turn)) / len(products)


def random_linear(
    matmul: Any, format: WeightFormat, outs: int, ins: int
) -> Callable[[torch.Tensor], torch.Tensor]:
    width, groups = ins // 2 if format.bits == 4 else ins, (outs, format.num_groups(ins))
    codes = torch.randint(0, 120, (outs, width), dtype=torch.uint8, device=DEVICE)
    tensors = {
        "codes": codes if format.bits == 4 else codes.view(getattr(torch, format.codes)),
        "scales": torch.rand(groups, device=DEVICE) * 0.01 + 0.001,
    }
    if format.zeros:
        tensors["zeros"] = torch.randint(0, 16, groups, dtype=torch.uint8, device=DEVICE)
    layer = LinearLayer("measured", (Part("measured", outs),), ins, False, "bfloat16", DEVICE)
    made: Callable[[torch.Tensor], torch.Tensor] = matmul.linear(format, layer, tensors)
    return made
