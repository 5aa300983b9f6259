"""Run `dovetail bench`: throughput and latency of an engine in this process, or of a running server
over HTTP.

Each round measures all concurrencies in turn, so that a machine that becomes slower affects all of
them.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from dovetail import __version__
from dovetail.console import wide_console
from dovetail.errors import ConfigError
from dovetail.runtime.llm import LLM
from dovetail_bench.load import ClosedLoop, Figures, Work, latency_round, throughput_round
from dovetail_bench.machine import display_name, machine, plan_summary
from dovetail_bench.over_http import about_server, serve_round
from dovetail_bench.plots import write_plots
from dovetail_bench.profiling import Profile
from dovetail_bench.report import Point, Report

OpenLLM = Callable[..., AbstractContextManager[LLM]]
"""Loads the engine described by the command line. Keyword arguments override config values."""


def run(kind: str, args: argparse.Namespace, open_llm: OpenLLM) -> int:
    """Measure, print tables, and write JSON and plots if requested."""
    works = _works(kind, args)
    report = (
        _measure_server(args, works)
        if kind == "serve"
        else _measure_engine(kind, args, works, open_llm)
    )
    report.print(wide_console())
    if args.json:
        report.write_json(Path(args.json))
    if args.plot:
        for file in write_plots(report, Path(args.plot)):
            Console(stderr=True).print(f"wrote {file}", markup=False, highlight=False)
    return 0


def _works(kind: str, args: argparse.Namespace) -> list[Work]:
    """Return the work for each concurrency. Raises `ConfigError` for invalid counts."""
    if min(args.input_len, args.output_len, args.rounds) < 1:
        raise ConfigError("--input-len, --output-len and --rounds must be at least 1")
    if kind == "latency":
        return [Work(args.input_len, args.output_len, 1, 1)]
    if args.num_requests is not None and args.num_requests < 1:
        raise ConfigError("--num-requests must be at least 1")
    concurrency = args.concurrency or [16 if kind == "serve" else args.num_requests or 64]
    waves = 4 if kind == "serve" else 1
    return [
        Work(args.input_len, args.output_len, args.num_requests or waves * n, n)
        for n in concurrency
    ]


def _measure_engine(
    kind: str, args: argparse.Namespace, works: list[Work], open_llm: OpenLLM
) -> Report:
    measure = throughput_round if kind == "throughput" else latency_round
    with open_llm() as llm:
        for work in works:
            measure(llm, _short(work), 0)  # warm up
        points = _rounds(args.rounds, works, lambda work, seed: measure(llm, work, seed))
        plan = llm.plan
    if getattr(args, "breakdown", False):
        with open_llm(overlap=False) as llm:
            for i in track(
                range(len(works)), "timing the phases of a step", console=Console(stderr=True)
            ):
                throughput_round(llm, _short(works[i]), 0)  # warm up
                points[i].step_us = step_parts(llm, works[i], seed=1)
    return _report(kind, args, display_name(plan.model), plan_summary(plan), points)


def step_parts(llm: LLM, work: Work, seed: int) -> Figures:
    """Measure the mean duration of each phase of a step in microseconds; see
    `Profile.microseconds_a_step`."""
    loop = ClosedLoop(
        llm, work.prompts(seed, min(4000, llm.vocab_size)), work.output_len, work.concurrency
    )
    with Profile() as profile:
        profile.watch_engine(llm.engine)
        profile.watch_loop(loop)
        loop.run()
    return profile.microseconds_a_step()


def _measure_server(args: argparse.Namespace, works: list[Work]) -> Report:
    about = about_server(args.url)
    model = args.model or about["model"]
    serve_round(args.url, model, _short(works[-1]), 0)  # warm up
    points = _rounds(
        args.rounds, works, lambda work, seed: serve_round(args.url, model, work, seed)
    )
    server = {"version": about.get("version"), "fingerprint": about.get("plan")}
    return _report("serve", args, display_name(model), server, points)


def _short(work: Work) -> Work:
    return replace(work, output_len=min(4, work.output_len))


def _rounds(count: int, works: list[Work], measure: Callable[[Work, int], Figures]) -> list[Point]:
    points = [Point(work.concurrency, work.num_requests) for work in works]
    turns = [(i, seed) for seed in range(1, count + 1) for i in range(len(works))]
    for i, seed in track(turns, "measuring", console=Console(stderr=True)):
        points[i].rounds.append(measure(works[i], seed))
    return points


def _report(
    kind: str, args: argparse.Namespace, model: str, plan: dict[str, object], points: list[Point]
) -> Report:
    work = {"input_len": args.input_len, "output_len": args.output_len, "rounds": args.rounds}
    return Report(
        kind,
        time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        __version__,
        model,
        machine(),
        plan,
        work,
        points,
    )
