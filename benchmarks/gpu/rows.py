"""Facts as rows, each written as soon as it is known; and how time is measured on the device."""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import statistics
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

DRY = os.environ.get("DOVETAIL_GPU_DRY") == "1"
"""On a CPU with tiny sizes, to see that everything runs: figures mean nothing."""
INTERPRETED = ("triton", "torch", "torch-reference")
"""Providers for GPUs that also run on a CPU, if Triton is interpreted."""
DEVICE = "cpu" if DRY else "cuda:0"
DUMP_BEFORE = 3.0
"""Seconds before a section's limit at which it prints where it is."""


class DeviceLost(Exception):
    """After an error in a kernel, every later call of the process fails."""


@dataclass
class Row:
    """A figure. `ratio` is its value relative to a bound or a peer; `goal` is the least that it
    should be, or the most if `is_most`."""

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
        return (
            "met"
            if (self.ratio <= self.goal if self.is_most else self.ratio >= self.goal)
            else "MISSED"
        )


class Rows:
    """Writes a section's rows."""

    def __init__(self, path: Path, section: str, run: str, attempts: Path, end: float) -> None:
        self._path, self._section, self._run, self._attempts = path, section, run, attempts
        self._start, self._end = time.monotonic(), end
        lines = attempts.read_text().splitlines() if attempts.is_file() else []
        self._tried = {line[6:] for line in lines if line.startswith("begin ")}
        self._done = {line[5:] for line in lines if line.startswith("done ")}

    @property
    def seconds_left(self) -> float:
        return self._end - time.monotonic()

    def add(self, row: Row) -> None:
        filled = {k: v for k, v in asdict(row).items() if v not in ("", None, False)}
        self._write(
            {**filled, "value": row.value, **({"verdict": row.verdict} if row.verdict else {})}
        )
        print(line(row), flush=True)

    def fact(self, what: str, text: object) -> None:
        """A fact that is no figure."""
        self._write({"what": what, "text": text})
        print(f"{what}: {text}", flush=True)

    def failed(self, what: str, error: BaseException | str) -> None:
        row: dict[str, Any] = {"what": what, "error": error}
        if isinstance(error, BaseException):
            text = f"{type(error).__name__}: {error}"
            row["error"] = text if len(text) < 3000 else f"{text[:2000]}\n…\n{text[-900:]}"
            frames = traceback.extract_tb(error.__traceback__)[-4:]
            row["where"] = [f"{Path(f.filename).name}:{f.lineno} {f.name}" for f in frames]
            traceback.print_exception(error, file=sys.stderr)
        self._write(row)
        print(f"FAILED {what}: {str(row['error'])[:400]}", flush=True)

    def attempt(
        self,
        what: str,
        run: Callable[..., object],
        *arguments: Any,
        seconds: float = 60.0,
        is_needed: bool = False,
    ) -> bool:
        """Call `run`, and write its error as a row if it raises one; return whether it went well.

        An attempt that takes longer ends the process. The harness then starts the section again,
        and what was tried is skipped, unless it went well and the next attempts need it
        (`is_needed`). Raises `DeviceLost`.
        """
        if what in self._tried and not (is_needed and what in self._done):
            return False
        self._tried.add(what)
        self._mark("begin", what)
        self.watch(seconds)
        try:
            run(*arguments)
            self._mark("done", what)
            return True
        except Exception as e:
            self.failed(what, e)
            del e
            if is_device_lost():
                raise DeviceLost from None
            return False
        finally:
            self._mark("end", what)
            self.watch()

    def watch(self, seconds: float | None = None) -> None:
        """Print where the process is if it is still there after so many seconds, and end it; by
        default print it shortly before the section's limit."""
        left = self.seconds_left - DUMP_BEFORE
        is_attempt = seconds is not None and seconds < left
        faulthandler.dump_traceback_later(
            max(0.1, seconds if is_attempt and seconds else left), exit=is_attempt
        )

    def _mark(self, mark: str, what: str) -> None:
        with self._attempts.open("a") as file:
            file.write(f"{mark} {what}\n")

    def _write(self, row: dict[str, Any]) -> None:
        at = round(time.monotonic() - self._start, 2)
        data = json.dumps(
            {"section": self._section, "run": self._run, **row, "at": at},
            ensure_ascii=False,
            default=str,
        )
        with self._path.open("ab") as file:
            file.write(data.encode() + b"\n")


def is_device_lost() -> bool:
    """Whether the device still works after an error; what the error has left in memory is freed."""
    torch = sys.modules.get("torch")
    gc.collect()
    if torch is None or DRY or not torch.cuda.is_initialized():
        return False
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        return bool(torch.ones(2, device=DEVICE).sum().item() != 2)
    except Exception:
        return True


def line(row: Row) -> str:
    ratio = "" if row.ratio is None else f"{row.ratio:8.3f}"
    sign = "≤" if row.is_most else "≥"
    goal = "" if row.goal is None else f"{sign} {row.goal:g} {row.verdict}"
    return f"{row.what:62} {row.value:12.4g} {row.unit:8} {ratio:8} {goal:14} {row.beside}"


def seconds(run: Callable[[], object], *, rounds: int = 5, least: float = 0.05) -> float:
    """Median over rounds of the time of one `run`; a round takes `least` seconds or a run,
    whichever is longer."""
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
    import torch

    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begin.record()
    for _ in range(count):
        run()
    end.record()
    end.synchronize()
    return float(begin.elapsed_time(end)) / 1e3 / count


def captured(run: Callable[[], object]) -> Callable[[], object]:
    """The launches of `run` as a graph, so that the time of the host does not count. In a dry run,
    `run` itself."""
    if DRY:
        return run
    import torch

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
        import torch

        torch.cuda.synchronize()


def randn(*shape: int) -> torch.Tensor:
    """bfloat16 on the device."""
    import torch

    return torch.randn(*shape, device=DEVICE, dtype=torch.float32).to(torch.bfloat16)


def copy_bandwidth() -> float:
    """Bytes a second, counting those read and those written."""
    import torch

    size = 2**20 if DRY else 2**32
    source, target = (
        torch.zeros(size, dtype=torch.uint8, device=DEVICE),
        torch.empty(size, dtype=torch.uint8, device=DEVICE),
    )
    return 2 * size / seconds(lambda: target.copy_(source))


def matrix_rate() -> float:
    """bfloat16 operations a second, of random data."""
    n = 64 if DRY else 8192
    a, b = randn(n, n), randn(n, n)
    return 2 * n**3 / seconds(lambda: a @ b)
