"""Run a campaign of the fault hunt. Usage: python tests/hunt.py NAME [--count N] [--seed S]
[--seconds S]

Without a seed, one is chosen and printed. Trial i has the seed S + i, so that one that fails is run
again by its own seed.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path

from campaigns.base import run

sys.path.append(str(Path(__file__).parents[1] / "core/tests"))  # as for pytest

from campaigns.table import CAMPAIGNS


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("name", choices=CAMPAIGNS)
    parser.add_argument("--count", type=int, help="trials; default: a soak's")
    parser.add_argument("--seed", type=int, default=random.randrange(2**31))
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="no new trial is begun after so many"
    )
    args = parser.parse_args()
    campaign = CAMPAIGNS[args.name]
    print(f"{campaign.name}: {campaign.what}; seed {args.seed}", file=sys.stderr, flush=True)
    report = run(campaign, args.count or campaign.full, args.seed, seconds=args.seconds)
    print(json.dumps({"first_seed": args.seed, **report.as_json()}, indent=1))
    return 1 if report.faults else 0


if __name__ == "__main__":
    sys.exit(main())
