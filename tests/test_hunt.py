"""The campaigns of the fault hunt: a fixed slice of each in `make test`, fresh seeds and all of
them in `make soak`."""

from __future__ import annotations

import json
import os
import random
from pathlib import Path

import pytest
from campaigns.base import run
from campaigns.table import CAMPAIGNS

COUNT = int(os.environ.get("DOVETAIL_SOAK_COUNT", "0"))
"""Trials in the soak, which also says where to leave the report."""
FIXED_SEED = 20_260


@pytest.mark.parametrize("name", CAMPAIGNS)
def test_it_finds_nothing(name: str) -> None:
    campaign = CAMPAIGNS[name]
    seed = random.randrange(2**31) if COUNT else FIXED_SEED
    print("seed", seed)
    report = run(campaign, COUNT or campaign.slice, seed, at_length=bool(COUNT))
    if path := os.environ.get("DOVETAIL_SOAK_REPORT"):
        Path(path).write_text(json.dumps({"first_seed": seed, **report.as_json()}))
    assert not report.faults, "\n".join(f"{f['replay']}\n{f['what']}" for f in report.faults)
