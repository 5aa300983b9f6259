"""How long the threads of a step spin before they sleep, where OpenMP's library is GNU's (PyTorch
brings its own copy along).

Between two steps, and at the end of one, threads wait for each other. GNU's library lets them spin
for 300,000 turns, which is milliseconds: beside one busy process they use up the time that the
system grants them by waiting, and are stopped when there is work. Sleeping at once costs a small
model the time of waking its threads in every step. See benchmarks/waiting_threads.py for what lies
between.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

log = logging.getLogger(__name__)

SPIN_COUNT = 1_000
"""Turns of a loop around the CPU's pause instruction, of some 30 ns each on AMD's Zen 4: threads
that end a step one after the other meet without sleeping, and across the time between two steps
they sleep. Beside processes that want all cores one sequence decoded 1.2 to 4 times as fast as with
3,000 turns, and 2 to 6 times as with 10,000 (benchmarks/results/waiting_threads.json). What it
costs a tiny model on a quiet machine is yet to be measured; sleeping at once cost it 15 to 20 %."""
VARIABLE = "GOMP_SPINCOUNT"
OF_USERS = (VARIABLE, "OMP_WAIT_POLICY", "KMP_BLOCKTIME", "KMP_LIBRARY")
"""Each says how threads wait: where a user has set one, it stays at that."""


def spin_variables(environ: Mapping[str, str]) -> dict[str, str]:
    """What to add to the environment of a process that will load OpenMP's library; nothing where
    the user has decided."""
    return {} if any(name in environ for name in OF_USERS) else {VARIABLE: str(SPIN_COUNT)}


@contextmanager
def bounded_spinning() -> Iterator[None]:
    """Within it, an OpenMP library that is loaded into this process is told `spin_variables`: it
    reads them once, at that time.

    The environment is afterwards as it was. A library that is there already (torch was imported
    before) keeps spinning as it does, which is logged.
    """
    added = spin_variables(os.environ)
    if added and _is_loaded():
        log.info(
            "OpenMP's threads spin as they did: its library was there before the engine; set %s to"
            " decide",
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
    except OSError:  # not Linux: GNU's library is not what is used there
        return False
