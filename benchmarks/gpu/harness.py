"""Runs sections of a check, each in a process of its own with a time limit, and gathers what they
found.

A section writes a JSON line to `rows.jsonl` for every fact, as soon as the fact is known. One that
crashes, hangs or prints without end is stopped together with the processes that it started, and the
next one runs. Nothing here imports torch.

Files in the output folder: `<title>.json`, a summary that is replaced after every section;
`rows.jsonl`; `<title>.log`, the output of the sections that have ended; and `<section>.log` while a
section runs.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import platform
import select
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESTART = 75
"""Exit code of a section whose process can run no further attempt, because a kernel has broken its
device."""
HEAD, TAIL = 2**21, 2**17
"""Bytes of a section's output that are kept: the first ones, and the last ones of what comes after
them."""
CLOSING_SECONDS = 4.0
"""Of a run's time, for the summary and for processes that end slowly."""
ENDED, FAILED, TIMED_OUT, SKIPPED, STOPPED = (
    "ended",
    "failed",
    "timed out",
    "skipped",
    "interrupted",
)


@dataclass(frozen=True)
class Section:
    name: str
    target: str
    """`module:function` of this folder; the function takes a `Rows`."""
    seconds: float
    """Time limit. A section gets more if those before it took less than theirs."""
    least: float = 10.0
    """A section that would get less is skipped."""


@dataclass
class Outcome:
    """What became of a section."""

    state: str
    seconds: float = 0.0
    limit: float = 0.0
    detail: str = ""
    restarts: int = 0
    rows: list[dict[str, Any]] = field(default_factory=list)


class Harness:
    """A run of sections within `seconds` in all."""

    def __init__(
        self,
        out: Path,
        title: str,
        seconds: float,
        environment: dict[str, str],
        about: dict[str, Any],
    ) -> None:
        self.out, self.title, self.environment = out, title, environment
        out.mkdir(parents=True, exist_ok=True)
        self._start = time.monotonic()
        self._deadline = self._start + seconds - CLOSING_SECONDS
        self._run = f"{time.time():.3f}"
        """Tells this run's rows from those of an earlier one in the same folder."""
        self._stopping, self._lock = threading.Event(), threading.Lock()
        self.about = {
            "date": time.strftime("%Y-%m-%d %H:%M:%S"),
            "python": platform.python_version(),
            **about,
        }
        self.outcomes = self._earlier()

    def _earlier(self) -> dict[str, Outcome]:
        """Of sections that an earlier run in the same folder ended well."""
        try:
            found = json.loads((self.out / f"{self.title}.json").read_text())["sections"]
            return {name: Outcome(**one) for name, one in found.items() if one["state"] == ENDED}
        except (OSError, ValueError, KeyError, TypeError):
            return {}

    def is_done(self, name: str) -> bool:
        return name in self.outcomes and self.outcomes[name].state == ENDED

    def run(
        self, groups: Sequence[Sequence[Section]], go_on: Callable[[], str | None] = lambda: None
    ) -> list[str]:
        """Run groups of sections, one group after the other, the sections of a group at the same
        time; return the names of those that did not end well. `go_on` is asked before every group
        but the first: a text is a reason to skip the rest."""
        for section in (s for group in groups for s in group):
            self.outcomes[section.name] = Outcome(SKIPPED, detail="its turn did not come")
        previous = {s: signal.signal(s, self._stop) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            self.write()
            for i, group in enumerate(groups):
                later = sum(max(s.seconds for s in g) for g in groups[i + 1 :])
                self._run_group(group, later, go_on() if i else None)
                self.write()
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)
            self.write()
        return [s.name for group in groups for s in group if self.outcomes[s.name].state != ENDED]

    def _stop(self, number: int, frame: object) -> None:
        self._stopping.set()

    def _run_group(self, group: Sequence[Section], later: float, reason: str | None) -> None:
        left = self._deadline - time.monotonic()
        threads = []
        for section in group:
            allowed = min(left, max(section.seconds, left - later))
            why = "the run was interrupted" if self._stopping.is_set() else reason
            if why is None and allowed < min(section.least, section.seconds):
                why = f"too little time is left: {max(0.0, allowed):.0f} s"
            if why is not None:
                self.outcomes[section.name] = Outcome(SKIPPED, detail=why)
                self.add_row(section.name, what=section.name, error=f"skipped: {why}")
                continue
            print(f"- {section.name} (at most {allowed:.0f} s)", flush=True)
            threads.append(
                threading.Thread(target=self._run_section, args=(section, allowed), daemon=True)
            )
            threads[-1].start()
        for thread in threads:
            thread.join()

    def _run_section(self, section: Section, allowed: float) -> None:
        start = time.monotonic()
        outcome = Outcome(FAILED, limit=round(allowed, 1))
        with tempfile.TemporaryDirectory(prefix="dovetail-gpu-") as folder:
            attempts = Path(folder) / "attempts"
            try:
                self._until_ended(section, outcome, attempts, start + allowed)
            except Exception as e:  # the harness must outlive its own mistakes
                outcome.detail = f"the harness failed: {type(e).__name__}: {e}"
        outcome.seconds = round(time.monotonic() - start, 1)
        with self._lock:
            self._end_line()
            self.outcomes[section.name] = outcome
            self._keep_log(section)
            detail = f": {outcome.detail}" if outcome.detail else ""
            print(
                f"- {section.name} {outcome.state} after {outcome.seconds:.0f} s{detail}",
                flush=True,
            )

    def _until_ended(self, section: Section, outcome: Outcome, attempts: Path, end: float) -> None:
        """Run the section's process, and another one in its place if it died in an attempt: that
        one skips what was tried."""
        num_tried = 0
        while True:
            code = self._process(section, attempts, end)
            tried, unfinished = _attempts(attempts)
            if code == 0:
                outcome.state, outcome.detail = ENDED, ""
                return
            if self._stopping.is_set():
                outcome.state, outcome.detail = STOPPED, "the run was interrupted"
            elif code is None:
                outcome.state, outcome.detail = (
                    TIMED_OUT,
                    f"stopped at its limit of {outcome.limit:.0f} s",
                )
            else:
                outcome.state, outcome.detail = FAILED, _reason_of(code)
            if unfinished:
                self.add_row(section.name, what=unfinished, error=f"did not end: {outcome.detail}")
            is_new, num_tried = len(tried) > num_tried, len(tried)
            is_attempts_fault = unfinished is not None or code == RESTART
            if (
                outcome.state != FAILED
                or not is_attempts_fault
                or not is_new
                or end - time.monotonic() < 2
            ):
                return
            outcome.restarts += 1

    def _process(self, section: Section, attempts: Path, end: float) -> int | None:
        """The exit code of the section's process, or None if it was stopped."""
        limit = end - time.monotonic()
        arguments = [
            section.name,
            section.target,
            self.out / "rows.jsonl",
            attempts,
            f"{limit:.1f}",
            self._run,
        ]
        command = [sys.executable, "-u", str(HERE / "section.py"), *map(str, arguments)]
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            process_group=0,
        )
        assert process.stdout is not None
        pipe, code = process.stdout.fileno(), None
        with process.stdout, (self.out / f"{section.name}.log").open("ab") as log:
            copy = Output(log)
            while (
                (code := process.poll()) is None
                and time.monotonic() < end
                and not self._stopping.is_set()
            ):
                if not copy.take(pipe, 0.2):
                    time.sleep(0.05)  # it has closed its output, and runs on
            _kill(process)  # what it has started and left behind, too
            until = time.monotonic() + 1
            while time.monotonic() < until and copy.take(pipe, 0.1):
                pass
            copy.close()
        return code

    def add_row(self, section: str, **row: Any) -> None:
        with self._lock, (self.out / "rows.jsonl").open("a") as file:
            file.write(
                json.dumps({"section": section, "run": self._run, **row}, ensure_ascii=False) + "\n"
            )

    def rows(self) -> list[dict[str, Any]]:
        """Of this run."""
        return [row for row in read_rows(self.out / "rows.jsonl") if row.get("run") == self._run]

    def write(self) -> None:
        """The summary, in place of the one before."""
        by_section: dict[str, list[dict[str, Any]]] = {}
        for row in self.rows():
            kept = {k: v for k, v in row.items() if k not in ("section", "run")}
            by_section.setdefault(row.get("section", ""), []).append(kept)
        for name, rows in by_section.items():
            if name in self.outcomes:
                self.outcomes[name].rows = rows
        found = {
            "about": self.about,
            "seconds": round(time.monotonic() - self._start, 1),
            "sections": {name: asdict(outcome) for name, outcome in self.outcomes.items()},
        }
        fresh = self.out / f"{self.title}.json.new"
        fresh.write_text(json.dumps(found, indent=1, ensure_ascii=False) + "\n")
        fresh.replace(self.out / f"{self.title}.json")

    def print_summary(self, names: Sequence[str], most: int = 40) -> None:
        """States, errors (shortened: the files have the whole of them) and goals that were
        missed."""
        for name in names:
            one = self.outcomes[name]
            print(
                f"{name:18} {one.state:12} {one.seconds:6.1f} s  {len(one.rows):4} rows "
                f" {one.detail}"
            )
        rows = [(name, row) for name in names for row in self.outcomes[name].rows]
        errors = [(name, row) for name, row in rows if "error" in row]
        for name, row in errors[:most]:
            print(f"  {name}: {row.get('what', '')}: {' '.join(str(row['error']).split())[:160]}")
        if len(errors) > most:
            print(f"  and {len(errors) - most} errors more in {self.out / self.title}.json")
        missed = [(name, row) for name, row in rows if row.get("verdict") == "MISSED"]
        for name, row in missed[:most]:
            print(f"  {name}: {row['what']}: {row['ratio']:.3g} instead of {row['goal']:g}")
        sys.stdout.flush()

    def _end_line(self) -> None:
        """A process that was killed may have left half a row."""
        path = self.out / "rows.jsonl"
        if path.is_file() and (data := path.read_bytes()) and not data.endswith(b"\n"):
            with path.open("ab") as file:
                file.write(b"\n")

    def _keep_log(self, section: Section) -> None:
        """Few files: the section's log goes to the end of the run's."""
        path = self.out / f"{section.name}.log"
        with (self.out / f"{self.title}.log").open("ab") as log:
            log.write(f"===== {section.name}\n".encode())
            if path.is_file():
                log.write(path.read_bytes())
                path.unlink()


class Output:
    """Copies a process's output to a file: the first HEAD bytes at once, and at the end the last
    TAIL bytes."""

    def __init__(self, log: Any) -> None:
        self._log, self._written, self._dropped = log, 0, 0
        self._tail: collections.deque[bytes] = collections.deque()

    def take(self, pipe: int, seconds: float) -> bool:
        """Wait so long for output; False at its end."""
        if not select.select([pipe], [], [], seconds)[0]:
            return True
        data = os.read(pipe, 2**16)
        now, rest = data[: HEAD - self._written], data[max(0, HEAD - self._written) :]
        self._log.write(now)
        self._log.flush()
        self._written += len(now)
        if rest:
            self._tail.append(rest)
            while sum(map(len, self._tail)) - len(self._tail[0]) >= TAIL:
                self._dropped += len(self._tail.popleft())
        return bool(data)

    def close(self) -> None:
        if self._dropped:
            self._log.write(f"\n… {self._dropped} bytes left out …\n".encode())
        self._log.write(b"".join(self._tail))
        self._log.flush()


def _kill(process: subprocess.Popen[bytes]) -> None:
    """The process and all of its group."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=3)
    except subprocess.TimeoutExpired:  # within a call of the driver: nothing more can be done
        print(f"process {process.pid} does not end", flush=True)


def _attempts(path: Path) -> tuple[set[str], str | None]:
    """Attempts that were begun, and the one that has not ended, if any."""
    lines = path.read_text().splitlines() if path.is_file() else []
    begun = {line[6:] for line in lines if line.startswith("begin ")}
    return begun, lines[-1][6:] if lines and lines[-1].startswith("begin ") else None


def _reason_of(code: int) -> str:
    if code == RESTART:
        return "the device can no longer be used by its process"
    if code < 0:
        return f"its process was ended by {signal.Signals(-code).name}"
    return f"its process ended with exit code {code}"


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file, without lines that are not whole."""
    rows = []
    for line in path.read_text(errors="replace").splitlines() if path.is_file() else []:
        try:
            row = json.loads(line)
        except ValueError:
            continue
        if isinstance(row, dict):
            rows.append(row)
    return rows
