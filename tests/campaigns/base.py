"""What all campaigns share: trials from seeds, counters of what they did, and the faults that they
found."""

from __future__ import annotations

import contextlib
import math
import os
import sys
import time
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dovetail_testing.plugin import install

MAX_FAULTS = 20
"""After so many a campaign ends: they have one cause, or the campaign itself is wrong."""
PERCENTILES = {"p50": 50, "p99": 99, "max": 100}
TESTS = Path(__file__).parents[1]


@dataclass
class Report:
    """What a campaign did."""

    counts: Counter[str] = field(default_factory=Counter)
    times_ms: dict[str, list[float]] = field(default_factory=dict)
    figures: dict[str, float] = field(default_factory=dict)
    goals: list[dict[str, Any]] = field(default_factory=list)
    """`{what, value, at_most or at_least, met}`: what depends on the machine is no fault when it is
    missed."""
    faults: list[dict[str, Any]] = field(default_factory=list)
    """`{seed, replay, what}`."""
    at_length: bool = True
    """A soak, and no slice of `make test`."""

    def took(self, what: str, seconds: float) -> None:
        self.times_ms.setdefault(what, []).append(seconds * 1e3)

    def goal(
        self, what: str, value: float, *, at_most: float = math.inf, at_least: float = -math.inf
    ) -> None:
        limit = {"at_most": at_most} if at_most < math.inf else {"at_least": at_least}
        self.goals.append(
            {"what": what, "value": round(value, 3), **limit, "met": at_least <= value <= at_most}
        )

    def as_json(self) -> dict[str, Any]:
        times = {
            what: {
                "count": len(all_ms),
                **{name: round(quantile(all_ms, q), 1) for name, q in PERCENTILES.items()},
            }
            for what, all_ms in self.times_ms.items()
        }
        figures = {what: round(value, 3) for what, value in self.figures.items()}
        counts = dict(sorted(self.counts.items()))
        return {
            "counts": counts,
            "times_ms": times,
            "figures": figures,
            "goals": self.goals,
            "faults": self.faults,
        }


Trial = Callable[[int], None]
"""One try, all of whose choices follow from the seed. Raises `AssertionError` where the engine is
wrong."""


@dataclass(frozen=True)
class Campaign:
    """`open` makes ready what all trials share, for as long as they run."""

    name: str
    what: str
    open: Callable[[Report], AbstractContextManager[Trial]]
    full: int
    """Trials in the soak."""
    slice: int
    """Trials in `make test`: a few seconds."""


def run(
    campaign: Campaign,
    count: int,
    first_seed: int,
    *,
    seconds: float = math.inf,
    at_length: bool = True,
) -> Report:
    """`count` trials, of seeds that follow each other, within about `seconds`."""
    report, began = Report(at_length=at_length), time.monotonic()

    def fault(seed: int, count: int, error: Exception) -> None:
        what = f"{type(error).__name__}: {error}"
        print(
            f"{campaign.name}: seed {seed}: {what}\n{traceback.format_exc()}",
            file=sys.stderr,
            flush=True,
        )
        replay = f"python tests/hunt.py {campaign.name} --seed {seed} --count {count}"
        report.faults.append({"seed": seed, "replay": replay, "what": what[:2000]})

    try:
        with campaign.open(report) as trial:
            for seed in range(first_seed, first_seed + count):
                if time.monotonic() > began + seconds or len(report.faults) >= MAX_FAULTS:
                    break
                report.counts["trials"] += 1
                try:
                    trial(seed)
                except Exception as e:
                    fault(seed, 1, e)
    except Exception as e:  # when all had been tried
        fault(first_seed, report.counts["trials"], e)
    report.figures["seconds"] = time.monotonic() - began
    return report


def quantile(values: list[float], percent: float) -> float:
    """The smallest value that `percent` of all do not exceed."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]


@contextlib.contextmanager
def plugins(site: Path, *names: str) -> Iterator[None]:
    """Install the simulated worker and modules of `tests/`, by name, for this process and those
    that it starts."""
    install(site)
    for name in names:
        install(site, name, name)
    before, paths = os.environ.get("PYTHONPATH"), [str(site), str(TESTS)]
    os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, (*paths, before)))
    sys.path[:0] = paths
    try:
        yield
    finally:
        for path in paths:
            sys.path.remove(path)
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before
