"""Packed linear layers against torch's, and against how fast this machine reads memory: bf16,
shapes of real layers.

    python benchmarks/linear_cpu.py [--threads 2] [--rounds 5] [--json FILE]

Each side goes through as many copies of a layer as no cache holds, in turn; medians. GB/s are bytes
of weights read.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor

from dovetail.facts import device_facts
from dovetail_bench.machine import machine
from dovetail_worker_torch.loading.linear import Part
from dovetail_worker_torch.loading.packed import PackedLinear, lazy_zeros
from dovetail_worker_torch.native import Kernels

SHAPES = ((4096, 1024), (1024, 3072), (6144, 1024), (16384, 2048))
"""(outputs, inputs)"""
ROWS = (1, 4, 8, 16, 32, 128, 512, 2048)
BYTES = 400 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kernels = Kernels.load(device_facts())
    read = read_bandwidth(args.rounds)
    print(f"{kernels.instruction_set}; reads {read:.1f} GB/s")
    print("         layer  rows  torch GB/s  ours GB/s  of read  ours GFLOP/s  times torch")
    results = [r for shape in SHAPES for r in compare(kernels, *shape, read, args.rounds)]
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
            "threads": args.threads,
            "instruction_set": kernels.instruction_set,
            "read GB/s": read,
        }
        args.json.write_text(json.dumps({"about": about, "results": results}, indent=1))


def read_bandwidth(rounds: int) -> float:
    """GB/s of a sum over more than any cache holds."""
    memory = lazy_zeros(1 << 28, dtype=torch.float32).fill_(1)
    return memory.nbytes / statistics.median(seconds(memory.sum) for _ in range(rounds + 1)) / 1e9


def compare(
    kernels: Kernels, outputs: int, inputs: int, read: float, rounds: int
) -> list[dict[str, object]]:
    num_bytes = 2 * outputs * inputs
    weights = [torch.randn(outputs, inputs).bfloat16() for _ in range(max(1, BYTES // num_bytes))]
    packed = []
    for weight in weights:
        linear = PackedLinear(kernels, [Part("w", outputs)], inputs, False, torch.bfloat16)
        linear.targets()["w.weight"].store(weight)
        packed.append(linear)
    out = []
    for rows in ROWS:
        x = torch.randn(rows, inputs).bfloat16()
        layers = len(weights) if rows <= 32 else max(1, len(weights) * 32 // rows)

        def plain(x: Tensor = x, layers: int = layers) -> None:
            for weight in weights[:layers]:
                F.linear(x, weight)

        def ours(x: Tensor = x, layers: int = layers) -> None:
            for linear in packed[:layers]:
                linear(x)

        plain(), ours()  # warm up
        both = [(seconds(plain) / layers, seconds(ours) / layers) for _ in range(rounds)]
        theirs, mine = (statistics.median(column) for column in zip(*both, strict=True))
        ratio = statistics.median(a / b for a, b in both)
        out.append(
            {
                "outputs": outputs,
                "inputs": inputs,
                "rows": rows,
                "torch GB/s": num_bytes / theirs / 1e9,
                "ours GB/s": num_bytes / mine / 1e9,
                "of read": num_bytes / mine / 1e9 / read,
                "ours GFLOP/s": rows * num_bytes / mine / 1e9,
                "times torch": ratio,
            }
        )
        r = out[-1]
        print(
            f"{outputs:>7}×{inputs:<6} {rows:>5} {r['torch GB/s']:>11.1f} {r['ours GB/s']:>10.1f}"
            f" {r['of read']:>8.2f} {r['ours GFLOP/s']:>13.0f} {r['times torch']:>12.2f}"
        )
    return out


def seconds(call: Callable[[], object]) -> float:
    began = time.perf_counter()
    call()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
