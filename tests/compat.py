"""Runs the tests of what depends on transformers' internals with every version of it that the
bridge names as tried.

Usage: python tests/compat.py [--others | VERSION …]

--others: the versions that are not installed here.

Each version is installed, without what it needs, into a folder of `.compat/` that is put in front
of the environment's own packages; a version whose requirements the environment does not meet is
refused. One line per version; the output of a run goes to `.compat/transformers-VERSION.log`.
"""

from __future__ import annotations

import os
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, distributions, version
from pathlib import Path

from packaging.requirements import Requirement

from dovetail_models_transformers.versions import TESTED_TRANSFORMERS

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / ".compat"
VARIABLE = "DOVETAIL_COMPAT_TRANSFORMERS"
"""Names the version of a run, for tests/test_compat.py to check that it is the one imported."""
TESTS = (
    "tests/test_compat.py",
    "plugins/models_torch/tests",
    "plugins/models_transformers/tests",
    "plugins/quantize/tests",
    "tests/test_draft_model.py",
    "tests/test_exactness.py",
    "tests/test_example_architecture.py",
    "tests/test_quantize.py",
    "tests/test_quantized_checkpoints.py",
    "tests/test_torch_compile.py",
)


def install(wanted: str) -> Path:
    """Return the folder that holds this version, which is installed if it is not there."""
    folder, incomplete = (
        FOLDER / f"transformers-{wanted}",
        FOLDER / f"transformers-{wanted}.incomplete",
    )
    if not folder.is_dir():
        pip = [
            sys.executable,
            "-m",
            "pip",
            "install",
            "-q",
            "--disable-pip-version-check",
            "--no-deps",
            "--upgrade",
        ]
        subprocess.run([*pip, "--target", incomplete, f"transformers=={wanted}"], check=True)
        incomplete.rename(folder)
    return folder


def unmet(folder: Path) -> list[str]:
    """Requirements of the transformers in a folder that the environment does not meet."""
    (found,) = (
        d for d in distributions(path=[str(folder)]) if d.metadata["Name"] == "transformers"
    )
    return [text for text in found.requires or [] if not _is_met(Requirement(text))]


def _is_met(requirement: Requirement) -> bool:
    if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
        return True
    try:
        return requirement.specifier.contains(version(requirement.name), prereleases=True)
    except PackageNotFoundError:
        return False


def run(wanted: str) -> bool:
    """Run the tests with one version; print the outcome."""
    folder = install(wanted)
    if missing := unmet(folder):
        print(f"transformers {wanted}: not run: the environment does not meet {', '.join(missing)}")
        return False
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),
        VARIABLE: wanted,
        "OMP_WAIT_POLICY": "passive",
    }
    log = FOLDER / f"transformers-{wanted}.log"
    with log.open("w") as out:
        command = [sys.executable, "-m", "pytest", "-n", "2", "--dist", "worksteal", *TESTS]
        done = subprocess.run(
            command,
            cwd=ROOT,
            env={**os.environ, **environment},
            stdout=out,
            stderr=subprocess.STDOUT,
        )
    *_, outcome = log.read_text().strip().splitlines() or ["no output"]
    print(
        f"transformers {wanted}: {'passed' if done.returncode == 0 else 'FAILED'}: {outcome}"
        f" ({log.relative_to(ROOT)})",
        flush=True,
    )
    return done.returncode == 0


if __name__ == "__main__":
    versions = sys.argv[1:] or TESTED_TRANSFORMERS
    if versions == ["--others"]:
        versions = [wanted for wanted in TESTED_TRANSFORMERS if wanted != version("transformers")]
    results = [run(wanted) for wanted in versions]
    sys.exit(not all(results))
