"""Run every sabotage through its whole contract and write docs/sabotage.md. Usage: python
tests/sabotage_table.py"""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import torch
from sabotage import all_sabotages

from dovetail_testing.running import run_contracts

SEED = 20_260_101
HEAD = """<!-- Written by tests/sabotage_table.py: do not edit. -->
# What the conformance kit catches

Plugins that are wrong on purpose (`tests/sabotage/`), one mistake each, run through the whole contract of their extension point with
seed {seed}. In bold: the checks that are there for the mistake. `make test` runs one sabotage for each check; `make soak` all
of them with fresh seeds, and each contract on correct plugins over 50 seeds.

{counts}

| extension point | sabotage | what is wrong | caught by |
|---|---|---|---|
"""  # noqa: E501


def failed_checks(index: int) -> list[str]:
    """Of one sabotage, by its place among all."""
    torch.set_num_threads(1)
    s = all_sabotages()[index]
    results = run_contracts({s.name: s.contract(SEED)})
    return list(dict.fromkeys(r.check for r in results if r.outcome == "failed"))


def main() -> int:
    rows, missed, per_extension_point = [], [], dict[str, int]()
    sabotages = all_sabotages()
    with ProcessPoolExecutor(2, multiprocessing.get_context("spawn")) as pool:
        for s, failed in zip(
            sabotages, pool.map(failed_checks, range(len(sabotages))), strict=True
        ):
            if not set(s.caught_by) <= set(failed):
                missed.append(f"{s.extension_point}: {s.name}")
            others = [c for c in failed if c not in s.caught_by]
            caught = ", ".join(
                [
                    *(f"**{words(c)}**" for c in s.caught_by if c in failed),
                    *shortened(map(words, others)),
                ]
            )
            rows.append(f"| {s.extension_point} | {s.name} | {s.wrong} | {caught or 'MISSED'} |")
            per_extension_point[s.extension_point] = (
                per_extension_point.get(s.extension_point, 0) + 1
            )
            print(rows[-1], flush=True)
    counts = f"{len(rows)} sabotages: " + ", ".join(
        f"{n} of {extension_point}" for extension_point, n in per_extension_point.items()
    )
    counts += f". Caught: {len(rows) - len(missed)}."
    page = Path(__file__).parents[1] / "docs/sabotage.md"
    page.write_text(HEAD.format(seed=SEED, counts=counts) + "\n".join(rows) + "\n")
    print(f"missed: {missed}" if missed else "all caught")
    return 1 if missed else 0


def words(check: str) -> str:
    return check.removeprefix("test_").replace("_", " ")


def shortened(names: Iterable[str], most: int = 4) -> list[str]:
    listed = list(names)
    return listed if len(listed) <= most else [*listed[:most], f"{len(listed) - most} more"]


if __name__ == "__main__":
    sys.exit(main())
