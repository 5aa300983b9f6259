"""Campaigns of the fault hunt: many random trials of one kind, each made from a seed. `tests/hunt.py` runs them by name."""

from __future__ import annotations

from campaigns.answers import ANSWERS
from campaigns.base import Campaign
from campaigns.fuzz import FUZZ
from campaigns.interrupts import INTERRUPTS
from campaigns.processes import HANGS_CAMPAIGN, IDS
from campaigns.workloads import WORKLOADS

CAMPAIGNS: dict[str, Campaign] = {c.name: c for c in (WORKLOADS, INTERRUPTS, HANGS_CAMPAIGN, IDS, FUZZ, ANSWERS)}
