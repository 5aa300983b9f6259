"""Where a decode step's time goes that is not the model's: microseconds a step, 64 sequences of the tiny model.

    python benchmarks/host_time.py [--sequences 64] [--steps 300] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail.frontend.outputs import RequestState


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
    engine, spent = llm.engine, defaultdict[str, list[float]](list)
    runner = engine.worker._runner  # type: ignore[attr-defined]

    def timed(name: str, owner: Any, method: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            spent[name].append(1e6 * (time.perf_counter() - began))
            return result

        setattr(owner, method, wrapper)

    timed("schedule", engine.scheduler, "schedule")
    timed("commit", engine, "commit")
    timed("inputs", runner.table, "inputs")
    timed("attention plan", runner._backends[0], "plan")
    timed("model", runner.model, "forward")
    timed("logits", runner.model, "logits")
    timed("draw", runner, "draw")
    params = SamplingParams(max_tokens=steps + 50, temperature=0, ignore_eos=True)
    states = {}
    for i in range(count):
        request = llm._maker.make(prompt(16, i), params)
        states[request.request_id] = RequestState(request, llm.tokenizer)
        engine.add(request)
    for step in range(steps + 20):
        if step == 20:
            spent.clear()
        began = time.perf_counter()
        outputs = engine.step()
        spent["whole step"].append(1e6 * (time.perf_counter() - began))
        began = time.perf_counter()
        for output in outputs:
            states[output.request_id].push(output)
        spent["text (front-end)"].append(1e6 * (time.perf_counter() - began))
    return {name: statistics.median(values) for name, values in spent.items()}


if __name__ == "__main__":
    main()
