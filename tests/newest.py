"""Run the tests with the newest version of every dependency, and report what breaks. `make
test-newest`

    python tests/newest.py [PYTEST ARGUMENT …]

Installs into .venv-newest what the projects' ranges allow, newest first; only what tests/lock.py
chooses stays as it is. Says which versions differ from constraints.txt, then what failed. It ends
with 0 whatever fails, and with 1 only if the environment could not be made.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

from lock import BUILD, CHOSEN, ROOT, canonical, pins, projects

FOLDER = ROOT / ".venv-newest"


def main() -> int:
    python = str(FOLDER / "bin/python")
    if not Path(python).exists():
        venv.create(FOLDER, with_pip=True)
    pip = [python, "-m", "pip", "--disable-pip-version-check", "-q"]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as chosen:
        chosen.write("".join(f"{name}=={version}\n" for name, (version, _) in CHOSEN.items()))
        chosen.flush()
        install = [*pip, "install", "--upgrade", "--upgrade-strategy", "eager", "-c", chosen.name]
        editable = [
            a
            for folder in projects()
            for a in ("-e", f"{folder}[dev]" if folder == ROOT else str(folder))
        ]
        for arguments in ([*BUILD], ["--no-build-isolation", *editable]):
            if subprocess.run([*install, *arguments], check=False).returncode:
                print("the newest versions could not be installed")
                return 1
    listed = subprocess.run(
        [*pip, "list", "--format=json"], capture_output=True, text=True, check=True
    ).stdout
    found = {
        canonical(entry["name"]): entry["version"].partition("+")[0] for entry in json.loads(listed)
    }
    pinned = pins(ROOT / "constraints.txt")
    newer = [
        f"{name} {old} -> {found[name]}"
        for name, old in pinned.items()
        if found.get(name, old) != old
    ]
    print("\n".join(newer) or "every dependency is pinned at its newest version")
    if newer:
        command = [
            python,
            "-m",
            "pytest",
            "-n",
            "2",
            "--dist",
            "worksteal",
            "--tb=line",
            *sys.argv[1:],
        ]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, re.M)
        print(
            "\n".join(failed), done.stdout.strip().splitlines()[-1], done.stderr[-2000:], sep="\n"
        )
    return 0


if __name__ == "__main__":
    sys.exit(main())
