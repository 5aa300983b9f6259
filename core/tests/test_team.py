"""A team of threads (dovetail/team.h): every piece is done once and in order; threads end when they
are told to.

The calls check themselves (team.cpp), with other sizes and pauses each time. Nothing here depends
on how fast it is.
"""

from __future__ import annotations

import ctypes
import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest

from dovetail.facts import device_facts
from dovetail.native import build_library

SOURCE = Path(__file__).with_name("team.cpp")
NAME = "dovetail-team"


def opened(path: Path | str) -> ctypes.CDLL:
    library = ctypes.CDLL(str(path))
    library.new_team.restype = ctypes.c_void_p
    for function in (library.stop_team, library.free_team):
        function.argtypes, function.restype = [ctypes.c_void_p], None
    library.calls.argtypes = [ctypes.c_void_p, ctypes.c_int, ctypes.c_int, ctypes.c_uint32]
    library.calls.restype = ctypes.c_int64
    library.absences.argtypes, library.absences.restype = (
        [ctypes.c_void_p, ctypes.c_int64, ctypes.c_void_p],
        None,
    )
    return library


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    facts = device_facts()
    if facts.system != "Linux" or facts.machine not in ("x86_64", "AMD64"):
        pytest.skip("for Linux on x86-64")
    sources = tmp_path_factory.mktemp("csrc")
    shutil.copy(SOURCE, sources)
    return build_library("team", sources, facts, folder=tmp_path_factory.mktemp("cache"))


@pytest.fixture
def library(path: Path) -> ctypes.CDLL:
    return opened(path)


@pytest.fixture
def new_team(library: ctypes.CDLL) -> Iterator[Callable[[], int]]:
    made: list[int] = []

    def make() -> int:
        made.append(library.new_team())
        return made[-1]

    yield make
    for team in made:
        library.free_team(team)
    assert has_threads(0)


def has_threads(count: int) -> bool:
    """Of teams, in this process: soon, if not yet, as the system shows a thread for a moment after
    its end."""
    deadline = time.monotonic() + 20
    while (found := num_threads()) != count and time.monotonic() < deadline:
        time.sleep(0.001)
    return found == count


def num_threads() -> int:
    names = []
    for task in Path("/proc/self/task").iterdir():
        with suppress(OSError):  # it has ended meanwhile
            names.append((task / "comm").read_text().strip())
    return names.count(NAME)


def seed() -> int:
    return random.getrandbits(32)


@pytest.mark.parametrize("threads", [1, 2, 3, 4])
def test_every_piece_is_done_once_and_after_those_before(library, new_team, threads):
    team = new_team()
    assert library.calls(team, threads, 3000, seed()) == 0
    assert has_threads(threads - 1)


def test_two_teams_at_once_and_one_team_of_two_callers(library, new_team):
    teams = [new_team(), new_team()]
    with ThreadPoolExecutor(3) as pool:
        for _ in range(5):
            chosen = [teams[0], teams[1], random.choice(teams)]
            wrong = [pool.submit(library.calls, team, 3, 500, seed()) for team in chosen]
            assert [w.result() for w in wrong] == [0, 0, 0]


def test_the_number_of_threads_may_change(library, new_team):
    team = new_team()
    for _ in range(30):
        threads = random.randrange(1, 5)
        assert library.calls(team, threads, random.randrange(1, 20), seed()) == 0
        assert threads == 1 or has_threads(threads - 1)


def test_threads_start_with_the_first_call_and_end_when_told(library, new_team):
    team = new_team()
    library.stop_team(team)
    assert has_threads(0)
    for _ in range(100):
        threads = random.randrange(2, 5)
        assert library.calls(team, threads, random.randrange(1, 4), seed()) == 0
        if random.random() < 0.5:
            assert has_threads(threads - 1)
        for _ in range(random.randrange(1, 3)):
            library.stop_team(team)
            assert has_threads(0)


PROCESS = f"""
import os, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
from pathlib import Path
from test_team import has_threads, opened
library = opened(Path(sys.argv[1]))
team = library.new_team()
assert library.calls(team, 3, 50, 1) == 0 and has_threads(2)
time.sleep(float(sys.argv[2]))
"""
FORK = """
child = os.fork()
if child == 0:
    assert has_threads(0)
    if sys.argv[3] == "run":
        assert library.calls(team, 3, 50, 2) == 0 and has_threads(2)
    library.free_team(team)
    assert has_threads(0)
    os._exit(7)
assert library.calls(team, 3, 50, 3) == 0 and has_threads(2)
library.free_team(team)
assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
"""


@pytest.mark.parametrize("pause", [0, 0.01], ids=["spinning", "asleep"])
@pytest.mark.parametrize("code", ["", FORK], ids=["exit", "fork"])
@pytest.mark.parametrize("does", ["run", "free"])
def test_a_process_may_end_or_fork_with_its_threads_alive(path, code, pause, does):
    subprocess.run(
        [sys.executable, "-c", PROCESS + code, path, str(pause), does],
        check=True,
        timeout=60,
        env=os.environ,
    )


def absences(library: ctypes.CDLL, spans: list[tuple[int, int]]) -> list[int]:
    """Milliseconds, after a thread wanted to run for so many and lost so many of them."""
    given = (ctypes.c_int64 * (2 * len(spans)))(*(x for span in spans for x in span))
    away = (ctypes.c_int64 * len(spans))()
    library.absences(given, len(spans), away)
    return list(away)


def test_a_thread_stays_away_longer_each_time_it_is_soon_stopped_again(library):
    assert absences(library, [(6, 3)] * 9) == [10, 20, 40, 80, 160, 320, 500, 500, 500]
    assert absences(library, [(6, 3), (6, 3), (300, 0), (6, 3), (6, 3)]) == [10, 20, 0, 10, 20]


def test_a_thread_that_loses_little_stays(library):
    assert absences(library, [(1, 0), (50, 10), (3, 1), (200, 40)] * 10) == [0] * 40
    assert absences(library, [(4, 1), (4, 2)] * 3) == [0, 10, 0, 20, 0, 40]
