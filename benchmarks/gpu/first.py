"""What is run first on a machine with a GPU: in one call, the facts that decide what is done next.
See README.md beside this.

python benchmarks/gpu/first.py [--seconds 500] [--out FOLDER] [--dry] [SECTION …]
"""

from __future__ import annotations

import argparse
import os
import sys
import time
from pathlib import Path

import carried
from harness import Harness, Section

GROUPS = (
    (Section("install", "part_facts:install", 25),),
    (Section("facts", "part_facts:run", 35),),
    (  # at the same time: what takes long is to compile, and nothing is timed
        Section("smoke-attention", "first_smoke:attention", 75),
        Section("smoke-linear", "first_smoke:linear", 75),
        Section("smoke-decoder", "first_smoke:decoder", 75),
    ),
    (Section("tiny", "first_tiny:run", 50),),
    (Section("model", "first_model:run", 115),),
    (Section("attention", "first_attention:run", 105),),
    (Section("linear", "first_linear:run", 50),),
    (Section("contracts", "part_conformance:sample", 40),),
)
"""In the order in which they run; those of a group at the same time."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("sections", nargs="*", metavar="SECTION", help="default: all")
    parser.add_argument(
        "--seconds", type=float, default=500, help="for the whole run (default %(default)s)"
    )
    parser.add_argument("--out", type=Path, help="where results go (default: $OUT, or .gpu/out)")
    parser.add_argument(
        "--dry", action="store_true", help="on a CPU with tiny sizes: figures mean nothing"
    )
    args = parser.parse_args()
    names = [section.name for group in GROUPS for section in group]
    if unknown := set(args.sections) - set(names):
        parser.error(f"no section {', '.join(sorted(unknown))}; there are {', '.join(names)}")
    wanted = [n for n in args.sections or names if not (args.dry and n == "install")]
    out = args.out or Path(os.environ.get("OUT") or carried.ROOT / ".gpu/out")
    start = time.monotonic()
    about = {
        "command": " ".join(["python benchmarks/gpu/first.py", *sys.argv[1:]]),
        "is_dry": args.dry,
    }
    harness = Harness(out, "first", args.seconds, carried.environment(is_dry=args.dry), about)

    def no_gpu() -> str | None:
        """A reason not to go on: the facts say that there is no GPU. That they are not known in
        time is none."""
        errors = [
            row["error"] for row in harness.rows() if row.get("what") == "GPU" and "error" in row
        ]
        return next(
            (f"PyTorch finds no GPU: {e}" for e in errors if not e.startswith("did not end")), None
        )

    groups = [[s for s in group if s.name in wanted] for group in GROUPS]
    failed = harness.run([group for group in groups if group], no_gpu)
    print(f"{time.monotonic() - start:.0f} s in all; results are in {out}")
    harness.print_summary(wanted)
    return min(len(failed), 100)


if __name__ == "__main__":
    sys.exit(main())
