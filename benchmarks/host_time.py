"""Where a decode step's time goes that is not the model's: microseconds a step, 64 sequences of the
tiny model.

    python benchmarks/host_time.py [--sequences 64] [--steps 300] [--rounds 5] [--json FILE]

Kernels are the model's forward pass (whose own Python counts as theirs), the logits and the argmax;
all else is host time: the step without them, and the front-end's text. Text is measured both ways:
gathered until a sequence ends, as in `LLM.generate`, the end itself included, and streamed token by
token. Medians over steps, then over rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

from models import folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail.frontend.outputs import RequestState
from dovetail_bench.machine import machine


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--sequences", type=int, default=64)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with LLM(folder_of("c"), device="cpu", overlap=False) as llm:
        llm.generate(
            [[1]], SamplingParams(max_tokens=2)
        )  # the first call of a part is watched (attestation.py)
        time_parts(llm)
        rounds = [measure(llm, args.sequences, args.steps) for _ in range(args.rounds)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    print(f"{args.sequences} sequences, medians of {args.rounds} rounds")
    for name, value in medians.items():
        print(f"  {name:24s} {value:8.0f} µs")
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
            "sequences": args.sequences,
        }
        args.json.write_text(
            json.dumps(
                {"about": about, "µs": medians, "rounds": rounds}, indent=1, ensure_ascii=False
            )
        )


SPENT: dict[str, list[float]] = defaultdict(list)
KERNELS = ("model", "logits", "argmax")


def time_parts(llm: LLM) -> None:
    """Have each part add what it takes, in microseconds, to `SPENT`."""
    engine = llm.engine
    runner = engine.worker._runner  # type: ignore[attr-defined]

    def timed(name: str, owner: Any, method: str) -> None:
        call: Callable[..., Any] = getattr(owner, method)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            began = time.perf_counter()
            result = call(*args, **kwargs)
            SPENT[name].append(1e6 * (time.perf_counter() - began))
            return result

        setattr(owner, method, wrapper)

    timed("schedule", engine.scheduler, "schedule")
    timed("table", runner.table, "update")
    timed("inputs", runner.table, "inputs")
    timed("attention plan", runner._backends[0], "plan")
    timed("commit", engine, "commit")
    timed("model", runner.model, "forward")
    timed("logits", runner.model, "logits")
    timed("argmax", runner._sampler, "best")
    timed("draw", runner, "draw")


def measure(llm: LLM, count: int, steps: int) -> dict[str, float]:
    """Median microseconds of each part, once all sequences decode."""
    engine = llm.engine
    params = SamplingParams(max_tokens=steps, temperature=0, ignore_eos=True)
    gathered, streamed = {}, {}
    for i in range(count):
        request = llm._maker.make(prompt(16, i), params)
        gathered[request.request_id] = RequestState(request, llm.tokenizer, stream=False)
        streamed[request.request_id] = RequestState(request, llm.tokenizer)
        engine.add(request)
    num_steps = 0
    while engine.has_work:
        num_steps += 1
        if num_steps == 20:
            SPENT.clear()
        began = time.perf_counter()
        outputs = engine.step()
        SPENT["whole step"].append(1e6 * (time.perf_counter() - began))
        for name, states in (("text, gathered", gathered), ("text, streamed", streamed)):
            began = time.perf_counter()
            for output in outputs:
                states[output.request_id].push(output)
            SPENT[name].append(1e6 * (time.perf_counter() - began))
    # Differences are taken step by step: medians of parts do not add up to a median.
    SPENT["draw without argmax"] = less(SPENT.pop("draw"), SPENT["argmax"])
    host = less(SPENT.pop("whole step"), *(SPENT[name] for name in KERNELS))
    known = ("schedule", "table", "inputs", "attention plan", "draw without argmax", "commit")
    SPENT["rest of the step"] = less(host, *(SPENT[name] for name in known))
    out = {name: statistics.median(values) for name, values in SPENT.items()}
    # The text that is made at the end is a cost of every step: the mean has it, the median would
    # not.
    out["text, gathered"] = statistics.fmean(SPENT["text, gathered"])
    out["host time of a step"] = statistics.median(host)
    out["… with gathered text"] = out["host time of a step"] + out["text, gathered"]
    out["… with streamed text"] = out["host time of a step"] + out["text, streamed"]
    return out


def less(whole: list[float], *parts: list[float]) -> list[float]:
    return [w - sum(p) for w, *p in zip(whole, *parts, strict=True)]


if __name__ == "__main__":
    main()
