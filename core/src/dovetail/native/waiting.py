"""Limit how long the threads of a step spin before they sleep, if the OpenMP library is GNU's
(PyTorch contains a copy of it).

Between two steps, and at the end of one, threads wait for each other. By default GNU's library lets
them spin for 300,000 iterations, which is milliseconds. Next to a busy process, waiting then uses
up the CPU time that the system grants to the threads, and they are stopped when there is work.
Sleeping at once costs a small model the time to wake its threads in every step.
benchmarks/waiting_threads.py measures values in between.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SPIN_COUNT = 1_000
"""Iterations of a loop around the CPU's pause instruction, about 30 ns each on AMD's Zen 4. Threads
that end a step one after the other meet without sleeping; between two steps they sleep. Next to
processes that use all cores, one sequence decoded 1.2 to 4 times as fast as with 3,000 iterations,
and 2 to 6 times as fast as with 10,000 (benchmarks/results/waiting_threads.json). The cost for a
tiny model on an idle machine has not been measured yet; sleeping at once cost it 15 to 20 %."""
VARIABLE = "GOMP_SPINCOUNT"
OF_USERS = (VARIABLE, "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Variables with which a user can decide how threads wait. If one is set, nothing is changed."""


def spin_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """Return what to add to the environment of a process that will load the OpenMP library; empty
    if the user has decided."""
    return {} if any(name in environ for name in OF_USERS) else {VARIABLE: str(SPIN_COUNT)}


@contextmanager
def bounded_spinning() -> Iterator[None]:
    """Set `spin_variables` for an OpenMP library that is loaded within the block: it reads them
    once, when it is loaded.

    The environment is restored afterwards. If the library has already been loaded (because torch
    was imported before), its threads keep spinning as they do, which is logged.
    """
    added = spin_variables(os.environ)
    if added and _is_loaded():
        log.info(
            "the OpenMP library was loaded before the engine, so its threads spin as configured"
            " then; set %s to change this",
            VARIABLE,
        )
        added = {}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            os.environ.pop(name, None)


def _is_loaded(maps: Path = Path("/proc/self/maps")) -> bool:
    try:
        return "libgomp" in maps.read_text(encoding="utf-8", errors="replace")
    except OSError:  # not Linux, where GNU's library is not used
        return False
