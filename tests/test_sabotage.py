"""The conformance kit is tested: every plugin that is wrong on purpose is caught, and no correct
one is accused.

`make test` and `make test-real` run one sabotage for each check, with one fixed seed. `make soak`
(DOVETAIL_SOAK_SEEDS) runs all of them, each with every check that is there for it and fresh seeds,
and every contract on correct plugins with as many.
"""

from __future__ import annotations

import os
import random
import re
from itertools import groupby, product
from pathlib import Path
from typing import Any

import pytest
from sabotage import Sabotage, all_sabotages, controls

from dovetail.plugin.discovery import load_registry
from dovetail_testing.contracts import contract_of
from dovetail_testing.running import run_contracts

SABOTAGES, CONTROLS = all_sabotages(), controls()
FIXED_SEED = 20_260_101
NUM_SEEDS = int(os.environ.get("DOVETAIL_SOAK_SEEDS", "1"))
PAGE = Path(__file__).parents[1] / "docs/sabotage.md"
ENOUGH = {
    ("attention",): 25,
    ("quantization",): 20,
    ("matmul",): 20,
    ("architecture",): 20,
    ("scheduler", "kv_cache"): 12,
    ("worker",): 12,
    ("speculation",): 6,
    ("prefix_cache",): 6,
    ("eviction",): 4,
    ("routes",): 4,
    ("model",): 4,
    ("server",): 4,
}
SLICE = list(
    {
        (s.extension_point, s.caught_by[0]): s
        for s in reversed(SABOTAGES)
        if "patience" not in s.attributes
    }.values()
)
"""One for each check."""
NUM_QUICK = 1
"""Of an extension point: so many are tried by `make test`, and the others by `make test-real`."""
UNTESTED = ("attention", "speculation", "model")
"""The controls that are no plugin, with tests of its own."""
SLOW = {"test_random_step"}
"""Takes long over a correct plugin."""


def correct_ones() -> list[Sabotage]:
    """All that our own plugins offer; what a provider's plugin has it filled with is each in
    turn."""
    registry, found = load_registry(), list[Sabotage]()
    for offer in registry.offers:
        if (
            not offer.plugin.distribution.startswith("dovetail-")
            or contract_of(registry.extension_points[offer.extension_point]) is None
        ):
            continue
        inside = [
            s.name
            for s in registry.extension_points.values()
            if s.within == offer.extension_point and not s.many
        ]
        for inner in product(*(registry.of(name) for name in inside)):
            name = " over ".join([offer.qualified_name, *(o.provider.name for o in inner)])
            attributes = {"inner": {o.extension_point: o.provider for o in inner}}
            found.append(
                Sabotage(
                    name, offer.extension_point, "nothing", offer.provider, attributes=attributes
                )
            )
    return found


OURS = correct_ones()


def _slice() -> list[Any]:
    found: list[Any] = []
    for extension_point, group in groupby(
        sorted(SLICE, key=lambda s: s.extension_point), key=lambda s: s.extension_point
    ):
        for i, sabotage in enumerate(group):
            marks = [pytest.mark.real] * (i >= NUM_QUICK)
            found.append(
                pytest.param(sabotage, marks=marks, id=f"{extension_point}: {sabotage.name}")
            )
    return found


@pytest.mark.parametrize("sabotage", _slice())
def test_it_is_caught(sabotage: Sabotage) -> None:
    results = run_contracts(
        {sabotage.name: sabotage.contract(FIXED_SEED)},
        keyword=sabotage.caught_by[0],
        stop_at_first=True,
    )
    failed = [r for r in results if r.outcome == "failed"]
    assert failed, f"{sabotage.name} passes {sabotage.caught_by[0]}: {sabotage.wrong}"
    for result in failed:
        assert result.asks, result
        assert result.input, result
        assert result.causes, result


@pytest.mark.parametrize(
    "control",
    [c for c in CONTROLS if c.extension_point in UNTESTED],
    ids=lambda s: s.extension_point,
)
def test_what_the_sabotages_are_made_of_is_correct(control: Sabotage) -> None:
    """The checks that the sabotages are caught by do not fail by themselves."""
    checks = sorted(
        {s.caught_by[0] for s in SABOTAGES if s.extension_point == control.extension_point} - SLOW
    )
    results = run_contracts({"control": control.contract(FIXED_SEED)}, keyword=" or ".join(checks))
    assert [r for r in results if r.outcome == "failed"] == []
    assert {r.check for r in results} >= set(checks)


def test_there_are_enough_of_each() -> None:
    for extension_points, least in ENOUGH.items():
        assert sum(s.extension_point in extension_points for s in SABOTAGES) >= least, (
            f"of {extension_points}"
        )
    assert len({(s.extension_point, s.name) for s in SABOTAGES}) == len(SABOTAGES)
    extension_points = {s.name for s in load_registry().extension_points.values() if contract_of(s)}
    assert extension_points == {s.extension_point for s in SABOTAGES}, (
        "of every extension point that has a contract"
    )


def test_the_page_lists_them_all() -> None:
    """docs/sabotage.md is written by `python tests/sabotage_table.py`, which runs every contract in
    full."""
    listed = re.findall(r"^\| (\S+) \| ([^|]+) \|", PAGE.read_text(), re.M)
    assert [(s.extension_point, s.name) for s in SABOTAGES] == [
        (a, b.strip()) for a, b in listed if a in load_registry().extension_points
    ]


@pytest.mark.soak
@pytest.mark.parametrize("sabotage", SABOTAGES, ids=lambda s: f"{s.extension_point}: {s.name}")
def test_it_is_caught_whatever_the_seed(sabotage: Sabotage) -> None:
    for _ in range(max(1, NUM_SEEDS // 10)):
        seed = random.randrange(2**31)
        results = run_contracts(
            {sabotage.name: sabotage.contract(seed)}, keyword=" or ".join(sabotage.caught_by)
        )
        failed = {r.check for r in results if r.outcome == "failed"}
        assert failed >= set(sabotage.caught_by), (
            f"seed {seed}: {set(sabotage.caught_by) - failed} did not notice"
        )


@pytest.mark.soak
@pytest.mark.parametrize(
    "correct", [*CONTROLS, *OURS], ids=lambda s: f"{s.extension_point}: {s.name}"
)
def test_no_false_alarm(correct: Sabotage) -> None:
    begin = random.randrange(2**31)
    for seed in range(begin, begin + NUM_SEEDS):
        alarms = [
            r
            for r in run_contracts({correct.name: correct.contract(seed)})
            if r.outcome == "failed"
        ]
        assert alarms == [], f"seed {seed}"
