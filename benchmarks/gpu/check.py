"""Checks and measures everything on a GPU, in parts that can be resumed. See README.md beside this
file.

python benchmarks/gpu/check.py [PART …] [--seconds 540] [--again] [--out FOLDER] [--dry]
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from pathlib import Path

import carried
from harness import SKIPPED, Harness, Section

PARTS = {
    # name: most seconds
    "facts": 60,
    "conformance": 480,
    "attention": 300,
    "linear": 300,
    "model": 240,
    "throughput": 420,
}
"""Estimates until they have run once. A part is started only if so much time is left."""


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "parts", nargs="*", metavar="PART", help="default: all that have no result yet"
    )
    parser.add_argument(
        "--seconds", type=float, default=540, help="for the whole run (default %(default)s)"
    )
    parser.add_argument("--again", action="store_true", help="also those that have a result")
    parser.add_argument("--out", type=Path, help="where results go (default: $OUT, or .gpu/out)")
    parser.add_argument(
        "--dry", action="store_true", help="on a CPU with tiny sizes: figures mean nothing"
    )
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    environment = carried.environment(is_dry=args.dry)
    if not args.dry:
        carried.install()
        if not sees_gpu(environment):
            print(
                f"{sys.executable} has no PyTorch that sees a GPU: run this on a machine with one,"
                " or with --dry"
            )
            return 1
    out = args.out or Path(os.environ.get("OUT") or carried.ROOT / ".gpu/out")
    about = {
        "command": " ".join(["python benchmarks/gpu/check.py", *sys.argv[1:]]),
        "is_dry": args.dry,
    }
    harness = Harness(out, "check", args.seconds, environment, about)
    done = [
        name
        for name in args.parts or PARTS
        if harness.is_done(name) and not (args.again or args.parts)
    ]
    if done:
        print(f"have a result: {', '.join(done)}")
    wanted = [name for name in args.parts or PARTS if name not in done]
    sections = [
        Section(name, f"part_{name}:run", PARTS[name], least=PARTS[name] if len(wanted) > 1 else 10)
        for name in wanted
    ]
    harness.run([[section] for section in sections])
    harness.print_summary(wanted)
    left = [name for name in wanted if harness.outcomes[name].state == SKIPPED]
    failed = [name for name in wanted if not harness.is_done(name) and name not in left]
    if left:
        print(f"left for another run: {', '.join(left)}")
    print(f"failed: {', '.join(failed)}" if failed else "all that ran ended well")
    return len(failed)


def sees_gpu(environment: dict[str, str]) -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return not subprocess.run(
        [sys.executable, "-c", code], capture_output=True, check=False, env=environment
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
