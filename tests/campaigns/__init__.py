"""Campaigns of the fault hunt: many random trials of one kind, each made from a seed. `tests/hunt.py` runs them by name."""

from __future__ import annotations

from campaigns.base import Campaign
from campaigns.endings import DRAINS, KILLS
from campaigns.fuzz import FUZZ
from campaigns.hangs import HANGS
from campaigns.overload import OVERLOAD
from campaigns.workloads import WORKLOADS

CAMPAIGNS: dict[str, Campaign] = {c.name: c for c in (WORKLOADS, HANGS, KILLS, DRAINS, OVERLOAD, FUZZ)}
