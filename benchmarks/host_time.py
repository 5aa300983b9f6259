"""Where a decode step's time goes that is not the model's: microseconds a step, 64 sequences of the tiny model.

    python benchmarks/host_time.py [--sequences 64] [--steps 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

from models import folder_of, prompt

from dovetail import LLM
from dovetail.bench.load import ClosedLoop
from dovetail.bench.profiling import Profile


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with LLM(folder_of("c"), device="cpu", overlap=False) as llm:
        spent = measure(llm, args.sequences, args.steps)
    step = spent.pop("whole step")
    print(f"whole step {step:8.0f} µs, {args.sequences} sequences, medians")
    for name, value in spent.items():
        print(f"  {name:24s} {value:8.0f} µs  {100 * value / step:5.1f} %")
    if args.json:
        args.json.write_text(json.dumps({"sequences": args.sequences, "µs": {"whole step": step, **spent}}, indent=1))


def measure(llm: LLM, count: int, steps: int) -> dict[str, float]:
    """Median microseconds of each part."""
    engine = llm.engine
    runner = engine.worker._runner  # type: ignore[attr-defined]
    loop = ClosedLoop(llm, [prompt(16, i) for i in range(count)], steps + 50, count)
    with Profile() as profile:
        profile.watch("schedule", engine.scheduler, "schedule")
        profile.watch("commit", engine, "commit")
        profile.watch("inputs", runner.table, "inputs")
        profile.watch("attention plan", runner._backends[0], "plan")
        profile.watch("model", runner.model, "forward")
        profile.watch("logits", runner.model, "logits")
        profile.watch("draw", runner, "draw")
        profile.watch("whole step", engine, "step")
        profile.watch("text (front-end)", loop, "text")
        for _ in range(20):  # the prompts, and what is slow the first time
            loop.step()
        profile.seconds.clear()
        for _ in range(steps):
            loop.step()
    return {name: 1e6 * statistics.median(values) for name, values in profile.seconds.items()}


if __name__ == "__main__":
    main()
