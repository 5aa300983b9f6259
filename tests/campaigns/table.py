"""All campaigns, by name."""

from __future__ import annotations

from campaigns.answers import ANSWERS
from campaigns.base import Campaign
from campaigns.fuzz import FUZZ
from campaigns.http_faults import DRAINS, KILLS, OVERLOAD
from campaigns.interrupts import INTERRUPTS
from campaigns.processes import HANGS, IDS
from campaigns.workloads import WORKLOADS

ALL = (WORKLOADS, INTERRUPTS, HANGS, IDS, KILLS, DRAINS, OVERLOAD, FUZZ, ANSWERS)
CAMPAIGNS: dict[str, Campaign] = {campaign.name: campaign for campaign in ALL}
