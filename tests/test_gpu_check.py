"""The check for machines with a GPU runs: on a CPU, with tiny sizes, in Triton's interpreter."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
IS_SOAK = bool(os.environ.get("DOVETAIL_SOAK_SEEDS"))


LONG = pytest.param("throughput", marks=pytest.mark.skipif(not IS_SOAK, reason="make soak"))


@pytest.mark.parametrize("part", ["facts", "conformance", "attention", "linear", "model", LONG])
def test_dry_run(part, tmp_path):
    command = [sys.executable, str(ROOT / "gpu/check.py"), "--dry", part]
    done = subprocess.run(command, env={**os.environ, "OUT": str(tmp_path)}, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    found = json.loads((tmp_path / f"{part}.json").read_text())
    assert found["is_done"]
    assert found["rows"]
    assert found["about"]["is_dry"]
    assert found["about"].get("failed", []) == []
