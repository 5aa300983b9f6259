"""Test `dovetail bench` with the simulated worker: output, files and plots. Only the consistency of
the figures is checked."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from dovetail import LLM, SamplingParams
from dovetail.cli.main import main
from dovetail_bench.load import Clock, ClosedLoop, Work, percentile
from dovetail_bench.profiling import PARTS, Profile

pytestmark = pytest.mark.usefixtures("simulated")

SMALL = ["--input-len", "6", "--output-len", "5", "--rounds", "3"]


def bench(kind: str, model: Path, *args: str) -> int:
    return main(
        [
            "bench",
            kind,
            str(model),
            "--worker",
            "simulated",
            "--attention",
            "simulated",
            *SMALL,
            *args,
        ]
    )


def test_a_sweep_tells_machine_plan_and_every_round(
    model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "out.json"
    assert bench("throughput", model, "--concurrency", "1,3,2", "--json", str(path)) == 0
    data = json.loads(path.read_text())
    assert [p["concurrency"] for p in data["points"]] == [1, 3, 2]
    for point in data["points"]:
        assert len(point["rounds"]) == 3
        for name, median in point["medians"].items():
            assert median == sorted(r[name] for r in point["rounds"])[1]
    assert re.match(r"\d{4}-\d\d-\d\dT", data["date"])
    assert data["machine"]["cpu"]
    assert data["machine"]["num_cores"] >= 1
    with LLM(model, worker="simulated", attention="simulated") as llm:
        assert data["plan"]["fingerprint"] == llm.plan.fingerprint
    assert data["plan"]["choices"]["worker"]["provider"] == "simulated"
    assert str(model) not in path.read_text().replace(json.dumps(str(path)), "")
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [r[0] for r in rows if r[0].isdigit()] == ["1", "3", "2"]


def test_one_concurrency_shows_the_spread(model: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench("throughput", model, "--num-requests", "2") == 0
    out = capsys.readouterr().out
    assert re.search(r"figure +median +lowest +highest", out)
    for name in ("output tokens/s", "TTFT p50 ms", "ITL p99 ms"):
        low, high = map(float, re.search(rf"{name} +[\d.]+ +([\d.]+) +([\d.]+)", out).groups())  # type: ignore[union-attr]
        assert low <= high
    assert bench("latency", model) == 0
    assert re.search(r"decode tokens/s +[\d.]+", capsys.readouterr().out)


def test_the_parts_of_a_step_make_up_the_step(model: Path, tmp_path: Path) -> None:
    path = tmp_path / "out.json"
    assert bench("throughput", model, "--concurrency", "2", "--breakdown", "--json", str(path)) == 0
    parts = json.loads(path.read_text())["points"][0]["step_us"]
    whole = parts.pop("step")
    assert list(parts) == [*PARTS, "other"]
    assert min(parts.values()) >= 0
    assert sum(parts.values()) == pytest.approx(whole)


def test_plots_and_a_page_that_needs_no_other_file(model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "plots"
    assert (
        bench("throughput", model, "--concurrency", "1,2", "--breakdown", "--plot", str(folder))
        == 0
    )
    assert sorted(p.name for p in folder.iterdir()) == [
        "throughput-steps.png",
        "throughput.html",
        "throughput.png",
    ]
    for png in folder.glob("*.png"):
        assert png.read_bytes().startswith(b"\x89PNG")
    page = (folder / "throughput.html").read_text()
    sources = re.findall(r'(?:src|href)="([^"]{0,40})', page)
    assert len(sources) == 2
    assert all(s.startswith("data:image/svg+xml;base64,") for s in sources)
    assert page.count("<table>") == 2
    assert "output tokens/s" in page
    assert "fingerprint" in page


@pytest.mark.parametrize("counts", ["0", "1,,2", "4,x", "2,2", "-1"])
def test_concurrency_is_a_list_of_counts(
    model: Path, counts: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        bench("throughput", model, f"--concurrency={counts}")
    assert "is not a list of different counts" in capsys.readouterr().err


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("concurrency", [1, 3, 9])
def test_the_loop_keeps_so_many_requests_at_work(
    model: Path, overlap: bool, concurrency: int
) -> None:
    work = Work(input_len=6, output_len=5, num_requests=7, concurrency=concurrency)
    with LLM(model, worker="simulated", attention="simulated", overlap=overlap) as llm:
        loop = ClosedLoop(llm, work.prompts(1, llm.vocab_size), work.output_len, work.concurrency)
        most = 0
        while loop.busy:
            loop.step()
            most = max(most, len(llm.engine.requests))
        assert most == min(concurrency, 7)
        assert loop.num_tokens == 7 * 5
        assert (len(loop.clock.ttft), len(loop.clock.gaps)) == (7, 7 * 4)


def test_a_profile_changes_no_token_and_leaves_nothing_behind(model: Path) -> None:
    params = SamplingParams(max_tokens=6, temperature=0)
    with LLM(model, worker="simulated", attention="simulated", overlap=False) as llm:
        engine = llm.engine

        def own_methods() -> dict[str, list[str]]:
            objects: list[Any] = [engine, engine.scheduler, engine.worker]
            return {
                type(o).__name__: [k for k, v in vars(o).items() if callable(v)] for o in objects
            }

        before, expected = own_methods(), llm.generate("hello", params)[0].token_ids
        with Profile() as profile:
            profile.watch_engine(engine)
            profile.watch("commit", engine, "commit")  # a second watch of the same method
            assert llm.generate("hello", params)[0].token_ids == expected
        assert own_methods() == before
        assert len(profile.seconds["forward"]) == len(profile.seconds["sampling"]) == 6
        assert len(profile.seconds["commit"]) == 12
        llm.generate("hello", params)
        assert len(profile.seconds["forward"]) == 6


def test_the_clock_knows_first_tokens_from_later_ones() -> None:
    clock = Clock()
    clock.began("a", 7.0)
    for now in (7.5, 7.6, 7.8):
        clock.token("a", now)
    assert clock.ttft == pytest.approx([0.5])
    assert clock.gaps == pytest.approx([0.1, 0.2])
    assert clock.figures()["ITL p50 ms"] == pytest.approx(100)


def test_percentiles() -> None:
    values = [float(v) for v in range(100, -1, -1)]
    assert [percentile(values, p) for p in (0, 0.5, 0.99, 1)] == [0, 50, 99, 100]
    assert percentile([], 0.5) == 0
