"""PyTorch's OpenMP library really is told how long to spin, in this process and in an engine's
own."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from dovetail.native.waiting import OF_USERS, SPIN_COUNT

HERE = """
from dovetail import LLM, SamplingParams
with LLM("demo", device="cpu") as llm:
    llm.generate([[5, 6, 7]], SamplingParams(max_tokens=2))
"""
SERVED = """
import asyncio
from dovetail.plugin.config import load_config
from dovetail.runtime.serving import AsyncEngine
async def run():
    engine = AsyncEngine(load_config(model="demo", device="cpu", env={}))
    await engine.start()
    await engine.close()
asyncio.run(run())
"""


def told(code: str, **variables: str) -> set[str]:
    """What the libraries that were loaded say of themselves, as OMP_DISPLAY_ENV has them do at that
    time."""
    env = (
        {k: v for k, v in os.environ.items() if k not in OF_USERS}
        | {"OMP_DISPLAY_ENV": "VERBOSE"}
        | variables
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env=env,
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    return {line.split("'")[1] for line in done.stderr.splitlines() if "GOMP_SPINCOUNT" in line}


@pytest.mark.parametrize("code", [HERE, SERVED], ids=["here", "served"])
def test_spinning_is_bounded(code: str) -> None:
    assert told(code) == {str(SPIN_COUNT)}


def test_nothing_of_it_stays_in_the_environment() -> None:
    assert told(HERE + "import os\nassert 'GOMP_SPINCOUNT' not in os.environ") == {str(SPIN_COUNT)}


def test_users_decide() -> None:
    assert told(HERE, GOMP_SPINCOUNT="77") == {"77"}
    assert told(HERE, OMP_WAIT_POLICY="passive") == {"0"}


def test_torch_that_was_there_before_keeps_its_own() -> None:
    assert told("import torch" + HERE).isdisjoint({str(SPIN_COUNT), "0"})
