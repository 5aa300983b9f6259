"""The contracts of attention, matmul, quantization and worker on the GPU, as tests: what failed is in the rows and in a log."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

from rows import DRY, Row, Rows

HERE = Path(__file__).parent


def run(rows: Rows) -> None:
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--import-mode=importlib", str(HERE / "tests")]
    command += ["-c", str(HERE / "pytest.ini"), "--tb=short", "-rf"]
    command += ["-k", "test_declaration or test_single_token or test_life"] if DRY else ["-n", "8"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=470)
    rows.path.with_suffix(".log").write_text(done.stdout + done.stderr)
    counts = {what: int(n) for n, what in re.findall(r"(\d+) (passed|failed|skipped|error)", done.stdout)}
    rows.about["failed"] = re.findall(r"^(?:FAILED|ERROR) (\S+)", done.stdout, re.M)
    for what in ("passed", "failed", "error", "skipped"):
        count, goal = counts.get(what, 0), 0.0 if what in ("failed", "error") else None
        rows.add(Row(f"checks {what}", count, "", "", float(count), goal, is_most=True))
    print(done.stdout[-6000:])
    if not counts.get("passed"):
        raise SystemExit("no check passed")
