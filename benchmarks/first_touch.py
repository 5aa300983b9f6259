"""How long streams wait where the system hands the KV cache's memory out in a step, and what
getting it ahead saves.

    python benchmarks/first_touch.py [--requests 400] [--rounds 5] [--json FILE]

In turn, each in a new process: the demo model with 16 sequences at a time, memory got ahead (as it
is) and touched by steps. How much a page costs is the machine's. In a virtual machine it depends on
the memory's past: a large page took 0.09 ms where another process had used it lately, and 4.7 ms
where the hypervisor had to find it first.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

from dovetail import LLM
from dovetail_attention_cpu.ahead import Ahead
from dovetail_bench.load import ClosedLoop, Figures, Work, percentile
from dovetail_bench.machine import machine

CONCURRENCY = 16
SLOW = 0.001
"""Seconds of system time in a step that say that it waited for memory: the rest of a step has next
to none."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="demo")
    parser.add_argument("--requests", type=int, default=400)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--one", choices=["ahead", "touched"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one_run(args.model, args.requests, args.one == "ahead")))
        return
    rounds: dict[str, list[Figures]] = {"ahead": [], "touched": []}
    for i in range(args.rounds):
        for name in sorted(rounds, reverse=i % 2 == 1):
            command = [
                sys.executable,
                __file__,
                "--one",
                name,
                "--model",
                args.model,
                "--requests",
                str(args.requests),
            ]
            rounds[name].append(
                json.loads(
                    subprocess.run(command, check=True, capture_output=True, text=True).stdout
                )
            )
    medians = {
        name: {key: statistics.median(r[key] for r in of) for key in of[0]}
        for name, of in rounds.items()
    }
    for name, figures in medians.items():
        print(name, *(f"  {key:40s} {value:9.3f}" for key, value in figures.items()), sep="\n")
    if args.json:
        command = "python " + " ".join(["benchmarks/first_touch.py", *sys.argv[1:]])
        about = {"date": time.strftime("%Y-%m-%d"), "machine": machine(), "command": command}
        args.json.write_text(
            json.dumps({"about": about, "medians": medians, "rounds": rounds}, indent=1)
        )


def one_run(model: str, num_requests: int, is_ahead: bool) -> Figures:
    if not is_ahead:
        Ahead.reach = lambda self, slot: None  # type: ignore[method-assign]
    work = Work(64, 32, num_requests, CONCURRENCY)
    with LLM(
        model,
        scheduler={"max_num_seqs": CONCURRENCY},
        max_model_len=2048,
        kv_cache={"memory_gb": 2},
    ) as llm:
        loop = ClosedLoop(llm, work.prompts(1, 4000), work.output_len, work.concurrency)
        steps = list(timed_steps(loop))
    decode = [(wall, system) for wall, system, num_tokens in steps if num_tokens <= CONCURRENCY]
    return {
        "output tokens/s": loop.num_tokens / sum(wall for wall, _, _ in steps),
        "ITL p50 ms": loop.clock.figures()["ITL p50 ms"],
        "ITL p99 ms": loop.clock.figures()["ITL p99 ms"],
        "ITL p99.9 ms": 1e3 * percentile(loop.clock.gaps, 0.999),
        "longest decode step ms": 1e3 * max(wall for wall, _ in decode),
        "decode steps that waited for memory, %": (
            100 * sum(system > SLOW for _, system in decode) / len(decode)
        ),
        "system time in steps, %": (
            100 * sum(s for _, s, _ in steps) / sum(wall for wall, _, _ in steps)
        ),
    }


def timed_steps(loop: ClosedLoop) -> Iterator[tuple[float, float, int]]:
    """Of each step: its seconds, those that this thread was in the system, and its tokens."""
    engine = loop._engine
    while loop.busy:
        loop.feed()
        before, began = resource.getrusage(resource.RUSAGE_THREAD).ru_stime, time.perf_counter()
        outputs = engine.step()
        seconds = time.perf_counter() - began
        yield (
            seconds,
            resource.getrusage(resource.RUSAGE_THREAD).ru_stime - before,
            engine.num_scheduled_tokens,
        )
        loop.text(outputs)


if __name__ == "__main__":
    main()
