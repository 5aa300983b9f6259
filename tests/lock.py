"""Pin every distribution that the commands of the Makefile install, in constraints.txt and
tests/interop/constraints.txt.

    python tests/lock.py     # or: make lock

Takes the newest versions that the projects' ranges and CHOSEN allow. tests/test_constraints.py
checks the result.

pip resolves, because only pip finds the CPU build of torch where it is kept. It does so in a
virtual environment of its own, for the Python and the platform that this script runs on, and
installs nothing but what builds packages there.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
import tomllib
import venv
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[1]
CHOSEN = {
    "torch": (
        "2.13.0",
        "the CPU build is the default; another version may pull gigabytes of CUDA packages",
    ),
    "jax": ("0.10.2", "for the tests of attention_pallas: Pallas changes with each release"),
    "jaxlib": ("0.10.2", "goes with jax"),
    "triton": (
        "3.7.1",
        "for the tests of kernels: its interpreter and its compiler change with each release",
    ),
}
"""Versions that are chosen, each with its reason. All others are the newest that the projects'
ranges allow."""
BUILD = ("hatchling", "editables")
"""What builds the projects' own packages, editable ones too."""
HEADER = """\
# Every distribution that {what} installs, pinned. Written by `make lock`: change a project's range or CHOSEN in tests/lock.py
# instead of this file. Resolved for Python {python} on {platform}.
"""  # noqa: E501


def projects() -> Iterator[Path]:
    """Folders of the repository's distributions that the two commands install, the metapackage
    first."""
    yield ROOT
    yield ROOT / "core"
    yield ROOT / "kit"
    yield from (path.parent for path in sorted((ROOT / "plugins").glob("*/pyproject.toml")))


@dataclass(frozen=True)
class Environment:
    """A virtual environment that commands of the Makefile make, and the file that pins it."""

    what: str
    constraints: Path
    build: tuple[str, ...]
    """Installed first: what source distributions are built with."""
    requirements: tuple[str, ...]
    """As pip's arguments."""


def environments() -> list[Environment]:
    editable = [
        argument
        for folder in projects()
        for argument in ("-e", f"{folder}[dev]" if folder == ROOT else str(folder))
    ]
    interop = ROOT / "tests/interop"
    build = ("torch", "setuptools", "wheel", "numpy", "packaging", "ninja")
    return [
        Environment(
            "`make serve` or `make test`", ROOT / "constraints.txt", BUILD, (*BUILD, *editable)
        ),
        Environment(
            "`make interop`",
            interop / "constraints.txt",
            build,
            (*build, "-r", str(interop / "requirements.txt")),
        ),
    ]


def canonical(name: str) -> str:
    """A distribution's name as it is compared (PEP 503)."""
    return re.sub(r"[-_.]+", "-", name).lower()


def pins(path: Path) -> dict[str, str]:
    """Versions by canonical name. Raises `ValueError` for a line that pins nothing exactly."""
    found: dict[str, str] = {}
    for line in path.read_text().splitlines():
        entry = line.partition("#")[0].strip()
        if not entry:
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!]+)", entry)
        if match is None:
            raise ValueError(f"{path.name}: {entry!r} is not NAME==VERSION")
        if canonical(match[1]) in found:
            raise ValueError(f"{path.name}: {match[1]} is pinned twice")
        found[canonical(match[1])] = match[2]
    return found


def resolve(environment: Environment) -> dict[str, str]:
    """The newest versions that pip would install, without our own distributions."""
    own = {
        canonical(tomllib.loads((folder / "pyproject.toml").read_text())["project"]["name"])
        for folder in projects()
    }
    with tempfile.TemporaryDirectory() as scratch:
        chosen, report = Path(scratch) / "chosen.txt", Path(scratch) / "report.json"
        chosen.write_text("".join(f"{name}=={version}\n" for name, (version, _) in CHOSEN.items()))
        venv.create(Path(scratch) / "venv", with_pip=True)
        pip = [
            str(Path(scratch) / "venv/bin/python"),
            "-m",
            "pip",
            "--disable-pip-version-check",
            "-q",
            "install",
        ]
        pip += ["-c", str(chosen)]
        dry = ["--dry-run", "--ignore-installed", "--no-build-isolation", "--report", str(report)]
        for arguments in (environment.build, (*dry, *environment.requirements)):
            variables = {**os.environ, "BUILD_CUDA_EXT": "0"}  # gptqmodel's: no GPU takes part
            done = subprocess.run(
                [*pip, *arguments], capture_output=True, text=True, check=False, env=variables
            )
            if done.returncode:
                sys.exit(f"pip found no versions for {environment.what}:\n{done.stderr[-4000:]}")
        entries = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    found = {canonical(entry["name"]): entry["version"].partition("+")[0] for entry in entries}
    return {name: version for name, version in sorted(found.items()) if name not in own}


def main() -> None:
    python, platform = (
        ".".join(map(str, sys.version_info[:2])),
        f"{sys.platform} {os.uname().machine}",
    )
    for environment in environments():
        path = environment.constraints
        before = pins(path) if path.exists() else {}
        found = resolve(environment)
        lines = [
            f"{n}=={v}" + (f"  # {CHOSEN[n][1]}" if n in CHOSEN else "") for n, v in found.items()
        ]
        header = HEADER.format(what=environment.what, python=python, platform=platform)
        path.write_text(header + "\n".join(lines) + "\n")
        for name in sorted(found.keys() | before.keys()):
            if found.get(name) != before.get(name):
                print(f"{name}: {before.get(name, 'new')} -> {found.get(name, 'gone')}")
        print(f"{path.relative_to(ROOT)}: {len(found)} distributions")
    print("now run `make test` and `make test-real`")


if __name__ == "__main__":
    main()
