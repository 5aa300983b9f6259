"""Run one part (check.py does it, in a process for each): `check_part.py PART OUT`."""

from __future__ import annotations

import importlib
import platform
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent))

import torch
from rows import DRY, Rows


def main(part: str, out: str) -> None:
    about: dict[str, object] = {
        "date": time.strftime("%Y-%m-%d"), "command": f"make gpu-check PART={part}", "is_dry": DRY,
        "device": "cpu" if DRY else torch.cuda.get_device_name(0), "torch": torch.__version__,
        "python": platform.python_version(),
    }  # fmt: skip
    rows = Rows(Path(out) / f"{part}.json", about)
    start = time.monotonic()
    importlib.import_module(f"part_{part}").run(rows)
    about["seconds"] = round(time.monotonic() - start)
    rows.write(is_done=True)
    print(f"{part}: {len(rows.rows)} rows in {about['seconds']} s")


if __name__ == "__main__":
    main(*sys.argv[1:])
