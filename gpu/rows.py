"""Figures as rows: each beside its bound, written as they come; and how time is taken."""

from __future__ import annotations

import json
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

DRY = os.environ.get("DOVETAIL_GPU_DRY") == "1"
"""On a CPU, tiny: to see that everything runs."""
INTERPRETED = ("triton", "torch", "torch-reference")
"""Providers for GPUs that run on a CPU too, where Triton is interpreted."""
DEVICE = torch.device("cpu" if DRY else "cuda:0")


@dataclass
class Row:
    """`ratio` is value to bound as `goal` means it: at least so much, or at most where `is_most`."""

    what: str
    value: float
    unit: str
    beside: str = ""
    ratio: float | None = None
    goal: float | None = None
    is_most: bool = False

    @property
    def verdict(self) -> str:
        if self.goal is None or self.ratio is None:
            return ""
        return "met" if (self.ratio <= self.goal if self.is_most else self.ratio >= self.goal) else "MISSED"


@dataclass
class Rows:
    """A part's rows, in a file from the first one on."""

    path: Path
    about: dict[str, object]
    rows: list[Row] = field(default_factory=list)

    def add(self, row: Row) -> None:
        self.rows.append(row)
        print(line(row), flush=True)
        self.write(is_done=False)

    def write(self, *, is_done: bool) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        found = {"about": self.about, "is_done": is_done, "rows": [asdict(r) | {"verdict": r.verdict} for r in self.rows]}
        self.path.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")


def line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:8.3f}"
    sign = "≤" if row.is_most else "≥"
    goal = "" if row.goal is None else f"{sign} {row.goal:g} {row.verdict}"
    return f"{row.what:62} {row.value:12.4g} {row.unit:8} {ratio:8} {goal:14} {row.beside}"


def seconds(run: Callable[[], object], *, rounds: int = 5, least: float = 0.05) -> float:
    """Median over rounds of the time of one `run`; a round lasts `least` seconds or a run, whichever is longer."""
    run()
    synchronize()
    start = time.perf_counter()
    run()
    synchronize()
    count = 1 if DRY else max(1, int(least / max(time.perf_counter() - start, 1e-6)))
    return statistics.median(_round(run, count) for _ in range(1 if DRY else rounds))


def _round(run: Callable[[], object], count: int) -> float:
    if DRY:
        start = time.perf_counter()
        for _ in range(count):
            run()
        return (time.perf_counter() - start) / count
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The launches of `run` as a graph, so that the host's share is not timed. In a dry run, `run` itself."""
    if DRY:
        return run
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        run()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    return graph.replay


def synchronize() -> None:
    if not DRY:
        torch.cuda.synchronize()


def copy_bandwidth() -> float:
    """Bytes a second, read and written."""
    size = 2**20 if DRY else 2**32
    source, target = torch.zeros(size, dtype=torch.uint8, device=DEVICE), torch.empty(size, dtype=torch.uint8, device=DEVICE)
    return 2 * size / seconds(lambda: target.copy_(source))


def matrix_rate() -> float:
    """bfloat16 operations a second, of random data."""
    n = 64 if DRY else 8192
    a, b = (torch.randn(n, n, device=DEVICE).to(torch.bfloat16) for _ in range(2))
    return 2 * n**3 / seconds(lambda: a @ b)
