"""The scripts for machines with a GPU run: on a CPU, with tiny sizes, in Triton's interpreter. And
what runs their sections outlasts sections that hang, crash or print without end."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
GPU = ROOT / "benchmarks/gpu"
MOST_FILES = 8
"""That a machine with a GPU may be able to send back."""

SECTIONS = """
import os, signal, subprocess, sys, time
from rows import Row

def good(rows):
    rows.add(Row("a figure", 1.5, "s", "a bound", 0.5, 0.9))
    rows.fact("a fact", {"version": "1"})

def raises(rows):
    rows.fact("before", 1)
    raise ValueError("what went wrong")

def hangs(rows):
    rows.fact("before", 1)
    time.sleep(60)

def leaves_a_process(rows):
    subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])

def ends_in_half_a_row(rows):
    rows.fact("before", 1)
    with rows._path.open("a") as file:
        file.write('{"section": "x", "wh')
        file.flush()
        os.kill(os.getpid(), signal.SIGKILL)

def prints(rows):
    for _ in range(200):
        print("x" * 50_000)
    print("the last line")
    rows.fact("after", 1)

def attempts(rows):
    rows.attempt("needed", lambda: print("NEEDED"), is_needed=True)
    rows.attempt("first", lambda: rows.fact("first", 1))
    rows.attempt("raises", lambda: 1 / 0)
    rows.attempt("crashes", lambda: os.kill(os.getpid(), signal.SIGSEGV))
    rows.attempt("hangs", time.sleep, 60, seconds=0.5)
    rows.attempt("last", lambda: rows.fact("last", 1))

def breaks_the_device(rows):
    import rows as module

    module.is_device_lost = lambda: True
    rows.attempt("breaks", lambda: 1 / 0)
    rows.attempt("breaks again", lambda: 1 / 0)
    module.is_device_lost = lambda: False
    rows.attempt("goes on", lambda: rows.fact("goes on", 1))

def comes(rows, name, other):
    rows._path.with_name(name).touch()
    while not rows._path.with_name(other).exists():
        time.sleep(0.02)

def one(rows):
    comes(rows, "one", "other")

def other(rows):
    comes(rows, "other", "one")
"""

RUN = """
import os, pathlib, sys
sys.path.insert(0, {gpu!r})
from harness import Harness, Section
groups = [[Section(f"{{name}}", f"sections_under_test:{{name}}", *times) for name, *times in group] for group in {groups!r}]
harness = Harness(pathlib.Path({out!r}), "run", {seconds!r}, dict(os.environ), {{"is_dry": True}})
failed = harness.run(groups)
harness.print_summary([s.name for g in groups for s in g])
sys.exit(len(failed))
"""  # noqa: E501


@pytest.fixture
def start(tmp_path):
    """Start a run of sections, in groups of (name, seconds[, least]); `out` holds its results."""
    (tmp_path / "sections_under_test.py").write_text(SECTIONS)

    def run(groups, seconds=60.0):
        script = RUN.format(gpu=str(GPU), groups=groups, out=str(tmp_path / "out"), seconds=seconds)
        environment = {**os.environ, "PYTHONPATH": str(tmp_path), "DOVETAIL_GPU_DRY": "1"}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
        return subprocess.Popen([sys.executable, "-c", script], env=environment, **pipes)

    return run


@pytest.fixture
def run(start, tmp_path):
    def run(*groups, seconds=60.0):
        process = start(groups, seconds)
        printed, _ = process.communicate(timeout=60)
        assert not [*(tmp_path / "out").glob("*.new")]
        assert len([*(tmp_path / "out").iterdir()]) <= MOST_FILES
        return found(tmp_path), printed

    return run


def found(tmp_path):
    return json.loads((tmp_path / "out/run.json").read_text())["sections"]


def rows_of(section):
    return {
        row["what"]: row.get("error") or row.get("text") or row.get("value")
        for row in section["rows"]
    }


def test_a_section_that_ends_well(run):
    sections, printed = run([("good", 20)])
    assert sections["good"]["state"] == "ended"
    figure, fact = sections["good"]["rows"]
    assert figure["value"] == 1.5
    assert figure["verdict"] == "MISSED"
    assert fact["text"] == {"version": "1"}
    assert "good" in printed


def test_one_failure_does_not_hide_the_others(run, tmp_path):
    """Each kind of failure, and its rows; then a section that ends well."""
    sections, printed = run(
        [("raises", 20)], [("ends_in_half_a_row", 20)], [("leaves_a_process", 20)], [("good", 20)]
    )
    assert {name: one["state"] for name, one in sections.items()} == {
        "raises": "failed",
        "ends_in_half_a_row": "failed",
        "leaves_a_process": "ended",
        "good": "ended",
    }
    assert rows_of(sections["raises"]) == {"before": 1, "raises": "ValueError: what went wrong"}
    assert rows_of(sections["ends_in_half_a_row"]) == {"before": 1}
    assert "SIGKILL" in sections["ends_in_half_a_row"]["detail"]
    assert sections["leaves_a_process"]["seconds"] < 15
    assert len(sections["good"]["rows"]) == 2
    assert "raises: ValueError: what went wrong" in printed
    log = (tmp_path / "out/run.log").read_text()
    assert log.index("===== raises") < log.index("Traceback") < log.index("===== good")


def test_a_section_that_hangs(run, tmp_path):
    """It is stopped at its limit, after it has printed where it is; the time that sections leave
    goes to the next."""
    sections, _ = run([("hangs", 5)], [("good", 20)], seconds=30)
    assert sections["hangs"]["state"] == "timed out"
    assert rows_of(sections["hangs"]) == {"before": 1}
    assert 4 < sections["hangs"]["seconds"] < 12
    assert sections["good"]["state"] == "ended"
    assert "in hangs" in (tmp_path / "out/run.log").read_text()


def test_the_whole_run_has_a_deadline(run):
    start = time.monotonic()
    sections, _ = run([("hangs", 100, 1)], [("good", 20)], [("raises", 20)], seconds=8)
    assert time.monotonic() - start < 20
    assert sections["hangs"]["state"] == "timed out"
    for name in ("good", "raises"):
        assert sections[name]["state"] == "skipped"
        assert "too little time is left" in rows_of(sections[name])[name]


def test_a_section_that_prints_without_end(run, tmp_path):
    sections, _ = run([("prints", 30)])
    assert sections["prints"]["state"] == "ended"
    assert rows_of(sections["prints"]) == {"after": 1}
    log = (tmp_path / "out/run.log").read_bytes()
    assert len(log) < 2**22
    assert b"bytes left out" in log
    assert b"the last line" in log


def test_attempts(run, tmp_path):
    """One that raises is a row. So is one that ends the process, or hangs; a new process tries the
    others."""
    sections, _ = run([("attempts", 40)])
    found = rows_of(sections["attempts"])
    assert list(found) == ["first", "raises", "crashes", "hangs", "last"]
    assert found["raises"] == "ZeroDivisionError: division by zero"
    assert "SIGSEGV" in found["crashes"]
    assert "did not end" in found["hangs"]
    assert sections["attempts"]["state"] == "ended"
    assert sections["attempts"]["restarts"] == 2
    assert (tmp_path / "out/run.log").read_text().count("NEEDED") == 3


def test_a_device_that_an_attempt_has_broken(run):
    sections, _ = run([("breaks_the_device", 40)])
    assert list(rows_of(sections["breaks_the_device"])) == ["breaks", "breaks again", "goes on"]
    assert sections["breaks_the_device"]["state"] == "ended"


def test_sections_of_a_group_run_at_the_same_time(run):
    """Each waits for the other."""
    sections, _ = run([("one", 20), ("other", 20)])
    assert [section["state"] for section in sections.values()] == ["ended", "ended"]


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_run_leaves_its_summary(start, tmp_path, number):
    process = start([[("good", 20)], [("hangs", 50)], [("raises", 20)]], 100)
    until = time.monotonic() + 30
    while '"section": "hangs"' not in (
        rows.read_text() if (rows := tmp_path / "out/rows.jsonl").exists() else ""
    ):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.send_signal(number)
    process.communicate(timeout=20)
    sections = found(tmp_path)
    assert {name: one["state"] for name, one in sections.items()} == {
        "good": "ended",
        "hangs": "interrupted",
        "raises": "skipped",
    }
    assert rows_of(sections["hangs"]) == {"before": 1}


def test_a_run_that_is_killed_leaves_what_ended_before(start, tmp_path):
    process = start([[("good", 20)], [("hangs", 50)]], 100)
    until = time.monotonic() + 30
    while '"section": "hangs"' not in (
        rows.read_text() if (rows := tmp_path / "out/rows.jsonl").exists() else ""
    ):
        assert time.monotonic() < until
        time.sleep(0.05)
    process.kill()
    process.communicate()
    sections = found(tmp_path)
    assert sections["good"]["state"] == "ended"
    assert sections["hangs"]["state"] == "skipped"
    assert len([*(tmp_path / "out").iterdir()]) <= MOST_FILES


# The scripts themselves.


def dry_run(script, out, *arguments):
    environment = {**os.environ, "OUT": str(out), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, str(GPU / script), "--dry", *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    summary = json.loads((out / f"{Path(script).stem}.json").read_text())
    assert summary["about"]["is_dry"]
    for name, section in summary["sections"].items():
        errors = [row for row in section["rows"] if "error" in row]
        assert (section["state"], errors) == (
            "ended",
            [],
        ), f"{name}: {section['detail']}\n{done.stdout[-3000:]}"
        assert section["rows"], name
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert len([*out.iterdir()]) <= MOST_FILES
    return summary["sections"], done.stdout


def test_first(tmp_path):
    sections, _ = dry_run("first.py", tmp_path)
    assert [*sections] == [
        "facts",
        "smoke-attention",
        "smoke-linear",
        "smoke-decoder",
        "tiny",
        "model",
        "attention",
        "linear",
        "contracts",
    ]


def test_parts_can_be_resumed(tmp_path):
    dry_run("check.py", tmp_path, "facts")
    (tmp_path / "check.json").write_text(
        (tmp_path / "check.json").read_text().replace('"facts"', '"throughput"')
    )
    sections, _ = dry_run("check.py", tmp_path, "facts")
    assert {*sections} == {"facts", "throughput"}
    command = [sys.executable, str(GPU / "check.py"), "--dry", "--seconds", "30"]
    done = subprocess.run(
        command,
        env={**os.environ, "OUT": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert "have a result: facts, throughput" in done.stdout
    assert "left for another run: conformance, attention, linear, model" in done.stdout
    assert done.returncode == 0


@pytest.mark.soak
@pytest.mark.parametrize("part", ["conformance", "attention", "linear", "model", "throughput"])
def test_part(part, tmp_path):
    dry_run("check.py", tmp_path, part)


# What travels.


@pytest.fixture
def carried(monkeypatch):
    monkeypatch.syspath_prepend(str(GPU))
    import carried

    return carried


def test_pins_are_those_of_the_constraints(carried):
    import pack

    lines = (ROOT / "constraints.txt").read_text().splitlines()
    constraints = {
        name.lower().replace("_", "-"): version
        for name, _, version in (line.partition("==") for line in lines)
    }
    assert pack.pins()
    for name, version in pack.pins().items():
        assert constraints.get(name, version) == version, name


def test_the_limits_of_the_first_run_fit(carried):
    import first

    assert sum(max(section.seconds for section in group) for group in first.GROUPS) <= 500 - 4


def test_what_the_machine_has_is_not_replaced(carried):
    has = {"tabulate": "1.0", "msgspec": "0.22", "pydantic-core": "3.0", "dovetail-core": "9"}
    wheels = {
        "tabulate": "0.9",
        "msgspec": "0.23.0",
        "pydantic": "2.14",
        "pydantic-core": "2.50",
        "dovetail-core": "0.1",
    }
    assert carried.present(wheels, has.get) == ["tabulate"], (
        "pydantic and its core go together, and ours always go along"
    )
    assert carried.present(wheels, {**has, "pydantic": "3.0"}.get) == [
        "tabulate",
        "pydantic",
        "pydantic-core",
    ]
    assert carried.numbers("2.14.4.post1+cu130") == (2, 14, 4)
    assert carried.name_and_version(Path("pydantic_core-2.50.5-cp312-cp312-manylinux.whl")) == (
        "pydantic-core",
        "2.50.5",
    )


def test_wheels_that_are_missing_are_named(carried):
    import pack

    assert pack.missing({*pack.pins(), "dovetail-core", "dovetail-testing"}) == []
    assert pack.missing({"dovetail-core", "dovetail-testing"}) == sorted(pack.pins())
