"""Runs one section of a check in this process. The harness starts it:

section.py NAME MODULE:FUNCTION ROWS ATTEMPTS LIMIT RUN
"""

from __future__ import annotations

import contextlib
import ctypes
import faulthandler
import importlib
import os
import signal
import sys
import time
from pathlib import Path

from harness import RESTART
from rows import DeviceLost, Rows


def main(name: str, target: str, path: str, attempts: str, limit: str, run: str) -> int:
    end_with_parent()
    faulthandler.enable()
    rows = Rows(Path(path), name, run, Path(attempts), time.monotonic() + float(limit))
    rows.watch()
    module, function = target.split(":")
    try:
        getattr(importlib.import_module(module), function)(rows)
    except DeviceLost:
        return RESTART
    except Exception as e:
        rows.failed(name, e)
        return 1
    return 0


def end_with_parent() -> None:
    """If the harness is killed, so is this process (Linux)."""
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(1, signal.SIGKILL)


if __name__ == "__main__":
    code = main(*sys.argv[1:])
    sys.stdout.flush()
    # Without the interpreter's and the driver's tidying up, which can hang after an error on the
    # device.
    os._exit(code)
