"""What travels to a machine without network: wheels and compiled kernels. Installs them there;
imports nothing but the standard library.

    python benchmarks/gpu/carried.py        # install
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import distributions
from pathlib import Path

from aot_flashinfer import ARCHITECTURE, VERSION
from aot_flashinfer import OUT as FLASHINFER

ROOT = Path(__file__).resolve().parents[2]
WHEELS, SITE, CACHE = ROOT / ".gpu/wheels", ROOT / ".gpu/site", ROOT / ".gpu/cache"
TOGETHER = {"pydantic-core": "pydantic"}
"""Packages that are of use with one version of another one only."""


def environment(*, is_dry: bool) -> dict[str, str]:
    """For the sections of a check."""
    found = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    found.setdefault(
        "TRITON_CACHE_DIR", str(CACHE / "triton")
    )  # one for all sections: a kernel is compiled once
    if is_dry:
        return {**found, "DOVETAIL_GPU_DRY": "1", "TRITON_INTERPRET": "1"}
    found["PYTHONPATH"] = os.pathsep.join([str(SITE), *filter(None, [found.get("PYTHONPATH", "")])])
    # A kernel of FlashInfer that was not carried is an error: to compile it takes minutes.
    return {**found, "FLASHINFER_CUDA_ARCH_LIST": ARCHITECTURE, "FLASHINFER_DISABLE_JIT": "1"}


def install() -> None:
    """Into a folder of its own, which the machine's other programs do not see. What the machine has
    is not replaced."""
    start, wheels = time.monotonic(), sorted(WHEELS.glob("*.whl"))
    names = {wheel: name_and_version(wheel) for wheel in wheels}
    left_out = present(dict(names.values()), installed)
    chosen = [wheel for wheel, (name, _) in names.items() if name not in left_out]
    stamp, listed = SITE / ".installed", "\n".join(f"{w.name} {w.stat().st_size}" for w in chosen)
    if chosen and not (stamp.is_file() and stamp.read_text() == listed):
        shutil.rmtree(SITE, ignore_errors=True)
        command = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-index",
            "--no-deps",
            "--no-compile",
            "--no-cache-dir",
        ]
        subprocess.run([*command, "--target", str(SITE), *map(str, chosen)], check=True)
        stamp.write_text(listed)
    if (SITE / "flashinfer").is_dir() and VERSION.is_file():
        shutil.copytree(FLASHINFER, SITE / "flashinfer/data/aot", dirs_exist_ok=True)
    print(
        f"installed {len(chosen)} wheels in {time.monotonic() - start:.0f} s; here already:"
        f" {', '.join(left_out) or 'none'}"
    )


def present(carried: dict[str, str], found: Callable[[str], str | None]) -> list[str]:
    """Names of carried packages that the machine has, in this version or a newer one; ours always
    go along."""
    names = [
        name
        for name, number in carried.items()
        if not name.startswith("dovetail")
        and (has := found(name)) is not None
        and numbers(has) >= numbers(number)
    ]
    return [
        name
        for name in names
        if TOGETHER.get(name, name) in names and _partner(name) in (None, *names)
    ]


def _partner(name: str) -> str | None:
    return next((one for one, other in TOGETHER.items() if other == name), None)


def installed(name: str) -> str | None:
    """The version that the machine has; what an earlier run installed in SITE does not count."""
    path = [place for place in sys.path if Path(place).resolve() != SITE]
    return next((one.version for one in distributions(name=name, path=path)), None)


def name_and_version(wheel: Path) -> tuple[str, str]:
    name, number = wheel.name.split("-")[:2]
    return re.sub(r"[-_.]+", "-", name).lower(), number


def numbers(version: str) -> tuple[int, ...]:
    """Those of the release, for a comparison: (2, 14, 4) of 2.14.4.post1."""
    found = re.match(r"\d+(\.\d+)*", version)
    return tuple(map(int, found[0].split("."))) if found else ()


if __name__ == "__main__":
    install()
