"""The contracts of attention, matmul, quantization and worker on the GPU, by pytest: each failed
check is a row; reports are in the log."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import threading
from collections import Counter
from pathlib import Path

from rows import DRY, Row, Rows

HERE = Path(__file__).parent
SAMPLE = (
    "test_single_token",
    "test_scales_of_keys_and_values",
    "test_sinks",
    "test_sliding_window",
    "test_many_rows",
    "test_rows_of_a_step_share_blocks",
    "test_buffers_are_reused_between_steps",
    "test_an_old_plan_does_the_new_step",
    "test_deterministic",
    "test_zeros_are_zeros",
    "test_rounded_inputs",
    "test_life",
    "test_greedy_is_the_references",
    "test_a_batch_is_each_alone",
    "test_steps_in_flight",
    "test_preemption_changes_nothing",
    "test_fused_is_its_parts",
)
"""Of every contract that has them."""
IN_DRY_RUN = ("test_declaration", "test_single_token", "test_life")
OUTCOMES = "PASSED|FAILED|ERROR|SKIPPED"
RESULT = re.compile(rf"\[gw\d+\] \[ *\d+%\] ({OUTCOMES}) (\S+)|(\S+::\S+) ({OUTCOMES})")
"""A line that pytest prints when a check has ended: with several workers, and with one."""
MARGIN = 6.0
"""Seconds before the section's limit at which pytest is stopped."""


def run(rows: Rows) -> None:
    contracts(rows, IN_DRY_RUN if DRY else (), 8)


def sample(rows: Rows) -> None:
    """Some checks of every contract, for a run that has less than a minute for them."""
    contracts(rows, IN_DRY_RUN[:2] if DRY else SAMPLE, 14)


def contracts(rows: Rows, names: tuple[str, ...], num_workers: int) -> None:
    command = [
        sys.executable,
        "-m",
        "pytest",
        "-v",
        "-p",
        "no:cacheprovider",
        "--import-mode=importlib",
        str(HERE / "tests"),
    ]
    command += [
        "-c",
        str(HERE / "pytest.ini"),
        "--tb=short",
        "-rf",
        *(["-k", " or ".join(names)] if names else []),
    ]
    command += [] if DRY else ["-n", str(num_workers), "--dist", "worksteal"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
        env={**os.environ, "PYTHONUNBUFFERED": "1", "COLUMNS": "200"},
    )
    stopped = threading.Event()

    def stop() -> None:
        stopped.set()
        process.kill()

    timer = threading.Timer(max(1.0, rows.seconds_left - MARGIN), stop)
    timer.start()
    counts, reasons = Counter[str](), dict[str, list[str]]()
    failed: list[str] = []
    assert process.stdout is not None
    for line in (
        process.stdout
    ):  # from a pipe, as it is printed: what has run is known whenever it is stopped
        print(line, end="", flush=True)
        if found := RESULT.match(line):
            outcome, name = (found[1], found[2]) if found[1] else (found[4], found[3])
            counts[outcome] += 1
            if outcome in ("FAILED", "ERROR") and name not in failed:
                failed.append(name)
                rows.failed(name, "failed: see the log")
        elif line.startswith("FAILED ") and " - " in line:
            name, reason = line[7:].split(" - ", 1)
            reasons.setdefault(name, []).append(reason.strip())
    timer.cancel()
    code = process.wait()
    for name, texts in reasons.items():
        rows.fact(f"why {name}", texts[0][:500])
    for outcome in ("PASSED", "FAILED", "ERROR", "SKIPPED"):
        goal = 0.0 if outcome in ("FAILED", "ERROR") else None
        rows.add(
            Row(
                f"checks {outcome.lower()}",
                counts[outcome],
                "",
                "",
                float(counts[outcome]),
                goal,
                is_most=True,
            )
        )
    if stopped.is_set():
        raise TimeoutError(
            f"pytest was stopped at the section's limit: {sum(counts.values())} checks had run"
        )
    if not counts["PASSED"]:
        raise RuntimeError(f"no check passed; pytest ended with exit code {code}")
