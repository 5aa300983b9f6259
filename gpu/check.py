"""Check and measure everything on a GPU, in parts that can be resumed. See README.md beside this file.

    python gpu/check.py [PART …] [--again] [--dry]
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

from aot_flashinfer import ARCHITECTURE, VERSION
from aot_flashinfer import OUT as FLASHINFER

HERE = Path(__file__).parent
ROOT = HERE.parent
WHEELS, SITE = ROOT / ".gpu/wheels", ROOT / ".gpu/site"
OUT = Path(os.environ.get("OUT") or ROOT / ".gpu/out")
PARTS = ("facts", "conformance", "attention", "linear", "model", "throughput")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", metavar="PART", help="default: all that have no result yet")
    parser.add_argument("--again", action="store_true", help="also those that have one")
    parser.add_argument("--dry", action="store_true", help="on a CPU with tiny sizes: figures mean nothing")
    args = parser.parse_args()
    if unknown := set(args.parts) - set(PARTS):
        parser.error(f"no part {', '.join(sorted(unknown))}; there are {', '.join(PARTS)}")
    environment = dict(os.environ)
    if args.dry:
        environment |= {"DOVETAIL_GPU_DRY": "1", "TRITON_INTERPRET": "1"}
    elif not sees_gpu():
        print(f"{sys.executable} has no PyTorch that sees a GPU: run this on a machine with one, or with --dry")
        return 1
    else:
        install(environment)
    failed = []
    for part in args.parts or PARTS:
        if is_done(part) and not (args.again or args.parts):
            print(f"{part}: has a result ({OUT / part}.json)")
            continue
        print(f"— {part}", flush=True)
        command = [sys.executable, str(HERE / "check_part.py"), part, str(OUT)]
        if subprocess.run(command, env=environment, cwd=ROOT, check=False).returncode:
            failed.append(part)
    print("failed: " + ", ".join(failed) if failed else "all parts ended well")
    return len(failed)


def sees_gpu() -> bool:
    code = "import sys, torch; sys.exit(not torch.cuda.is_available())"
    return not subprocess.run([sys.executable, "-c", code], capture_output=True, check=False).returncode


def is_done(part: str) -> bool:
    path = OUT / f"{part}.json"
    return path.is_file() and json.loads(path.read_text())["is_done"]


def install(environment: dict[str, str]) -> None:
    """What was carried, into a folder of its own; nothing that the machine has is touched."""
    wheels = sorted(WHEELS.glob("*.whl"))
    stamp = SITE / ".installed"
    names = "\n".join(f"{w.name} {w.stat().st_size}" for w in wheels)
    if wheels and not (stamp.is_file() and stamp.read_text() == names):
        start = time.monotonic()
        command = [sys.executable, "-m", "pip", "install", "-q", "--no-index", "--no-deps", "--no-compile", "--upgrade"]
        subprocess.run([*command, "--target", str(SITE), *map(str, wheels)], check=True)
        stamp.write_text(names)
        print(f"installed {len(wheels)} wheels in {time.monotonic() - start:.0f} s")
    if (SITE / "flashinfer").is_dir() and VERSION.is_file():
        shutil.copytree(FLASHINFER, SITE / "flashinfer/data/aot", dirs_exist_ok=True)
        # A kernel that was not carried is an error: it would be compiled for minutes.
        environment |= {"FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE, "FLASHINFER_DISABLE_JIT": "1"}
    if SITE.is_dir():
        environment["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [environment.get("PYTHONPATH", "")])])


if __name__ == "__main__":
    sys.exit(main())
