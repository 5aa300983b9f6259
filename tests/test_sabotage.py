"""The conformance kit is tested: every plugin that is wrong on purpose is caught, and no correct one is accused.

`make test` runs the check that each sabotage is for, with one fixed seed. `make soak` (DOVETAIL_SOAK_SEEDS) runs all of
them with fresh seeds, and every contract on correct plugins with as many.
"""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest
from sabotage import Sabotage, all_sabotages
from sabotage.plain_attention import provider as plain_attention

from dovetail.plugins.discovery import Offer, load_registry
from dovetail.testing.attention import AttentionContract
from dovetail.testing.contracts import contract_of
from dovetail.testing.running import run_contracts

SABOTAGES = all_sabotages()
FIXED_SEED = 20_260_101
NUM_SEEDS = int(os.environ.get("DOVETAIL_SOAK_SEEDS", "0"))
PAGE = Path(__file__).parents[1] / "docs/sabotage.md"
OURS = [o for o in load_registry().offers if o.plugin.distribution.startswith("dovetail-")]


@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.socket}: {s.name}")
def test_it_is_caught(sabotage: Sabotage) -> None:
    results = run_contracts(
        {sabotage.name: sabotage.contract(FIXED_SEED)}, keyword=sabotage.caught_by[0], stop_at_first=True
    )  # fmt: skip
    failed = [r for r in results if r.outcome == "failed"]
    assert failed, f"{sabotage.name} passes {sabotage.caught_by[0]}: {sabotage.wrong}"
    for result in failed:
        assert result.asks, result
        assert result.input, result
        assert result.causes, result


def test_what_the_sabotages_are_made_of_is_correct() -> None:
    cls = type("Control", (AttentionContract,), {"provider": plain_attention(), "seed": FIXED_SEED})
    results = run_contracts({"control": cls}, keyword="not random_step")
    assert [r for r in results if r.outcome == "failed"] == []
    assert len(results) > 20


def test_there_are_enough_of_each() -> None:
    counts = {socket: sum(s.socket == socket for s in SABOTAGES) for socket in {s.socket for s in SABOTAGES}}
    assert counts["attention"] >= 25
    assert counts["scheduler"] + counts["kv_cache"] >= 12
    assert counts["worker"] >= 8
    assert len({(s.socket, s.name) for s in SABOTAGES}) == len(SABOTAGES)


def test_the_page_lists_them_all() -> None:
    """docs/sabotage.md is written by `python tests/sabotage_table.py`, which runs every contract in full."""
    listed = re.findall(r"^\| (\S+) \| ([^|]+) \|", PAGE.read_text(), re.M)
    assert [(s.socket, s.name) for s in SABOTAGES] == [(a, b.strip()) for a, b in listed if a in load_registry().sockets]


@pytest.mark.skipif(not NUM_SEEDS, reason="make soak")
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.socket}: {s.name}")
def test_it_is_caught_whatever_the_seed(sabotage: Sabotage) -> None:
    for _ in range(max(1, NUM_SEEDS // 10)):
        seed = random.randrange(2**31)
        results = run_contracts({sabotage.name: sabotage.contract(seed)}, keyword=" or ".join(sabotage.caught_by))
        failed = {r.check for r in results if r.outcome == "failed"}
        assert failed >= set(sabotage.caught_by), f"seed {seed}: {set(sabotage.caught_by) - failed} did not notice"


@pytest.mark.skipif(not NUM_SEEDS, reason="make soak")
@pytest.mark.parametrize("offer", OURS, ids=lambda o: o.qualified_name)
def test_no_false_alarm(offer: Offer) -> None:
    base = contract_of(load_registry().sockets[offer.socket])
    if base is None:
        pytest.skip(f"{offer.socket} has no contract")
    begin = random.randrange(2**31)
    for seed in range(begin, begin + NUM_SEEDS):
        cls = type("Correct", (base,), {"provider": offer.provider, "seed": seed})
        alarms = [r for r in run_contracts({offer.provider.name: cls}) if r.outcome == "failed"]
        assert alarms == [], f"seed {seed}"
