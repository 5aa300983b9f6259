"""Reports what travels to a machine with a GPU: the tracked files, and what `make gpu-pack` has put
in .gpu.

    python benchmarks/gpu/pack.py [--limit MIB]

Fails above the limit, and where something that the checks cannot do without is missing.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections import Counter
from pathlib import Path

from aot_flashinfer import FOR_THE_CHECK, VERSION
from aot_flashinfer import OUT as FLASHINFER
from carried import ROOT, WHEELS, name_and_version

MIB = 2**20
LIMIT = 60
LARGEST = 12
REQUIREMENTS = ROOT / "benchmarks/gpu/requirements.txt"


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--limit",
        type=float,
        default=LIMIT,
        metavar="MIB",
        help="most of all together (default %(default)s)",
    )
    args = parser.parse_args()
    kinds = {
        "tracked files": tracked(),
        "wheels": under(WHEELS),
        "FlashInfer's kernels": under(FLASHINFER),
    }
    sizes = {path: path.stat().st_size for paths in kinds.values() for path in paths}
    total = sum(sizes.values())
    print(f"{'MiB':>7}  files")
    for kind, paths in kinds.items():
        print(f"{sum(sizes[p] for p in paths) / MIB:7.2f}  {len(paths):5}  {kind}")
    print(
        f"{total / MIB:7.2f}  {len(sizes):5}  in all; {args.limit:g} MiB are allowed\n\nthe"
        " largest:"
    )
    for path in sorted(sizes, key=lambda p: -sizes[p])[:LARGEST]:
        print(f"{sizes[path] / MIB:7.2f}  {path.relative_to(ROOT)}")
    print("\ntracked files by folder:")
    folders = Counter[str]()
    for path in kinds["tracked files"]:
        folders["/".join(path.relative_to(ROOT).parts[:-1][:2]) or "."] += sizes[path]
    for folder, size in folders.most_common(6):
        print(f"{size / MIB:7.2f}  {folder}")
    problems = missing({name_and_version(wheel)[0] for wheel in kinds["wheels"]})
    if not VERSION.is_file():
        print(
            "\nFlashInfer's kernels are not there, so that its checks are skipped: make"
            " gpu-flashinfer compiles them"
        )
    elif (count := sum(p.suffix == ".so" for p in kinds["FlashInfer's kernels"])) < len(
        FOR_THE_CHECK
    ):
        print(
            f"\n{count} of {len(FOR_THE_CHECK)} kernels of FlashInfer are there: make"
            " gpu-flashinfer compiles the others"
        )
    if problems:
        print(f"\nwheels are missing: {', '.join(problems)}")
    if total > args.limit * MIB:
        print(f"\ntoo large by {total / MIB - args.limit:.2f} MiB")
        return 1
    return bool(problems)


def tracked() -> list[Path]:
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return [ROOT / name for name in listed.split("\0") if name and (ROOT / name).is_file()]


def under(folder: Path) -> list[Path]:
    return [path for path in sorted(folder.rglob("*")) if path.is_file()]


def missing(names: set[str]) -> list[str]:
    """Packages that benchmarks/gpu/requirements.txt names, and our own core and kit, of which there
    is no wheel."""
    return sorted({"dovetail-core", "dovetail-testing", *pins()} - names)


def pins() -> dict[str, str]:
    """Versions in benchmarks/gpu/requirements.txt."""
    lines = [line.strip() for line in REQUIREMENTS.read_text().splitlines()]
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


if __name__ == "__main__":
    sys.exit(main())
