"""Drafting beside no drafting: decoded tokens per second of one engine with its drafter and
without, in turn.

    python benchmarks/speculation.py [--drafter ngram] [--models demo c a] [--rounds 21]
        [--overlap] [--json FILE]

- `copy`, one request at a time: an answer that repeats what is there already. The demo model goes
  on with code and tables that repeat themselves, and repeats a passage that its prompt has; the
  models of random weights run into a cycle by themselves.
- `random`, 1 to 64 requests at a time: prompts of random tokens, sampled at temperature 1. There is
  nothing to copy, so what is measured is what drafting costs where it does not help.
- `greedy`, the same sampled greedily: text that repeats itself by halves, as small models' does.

Both sides are one engine, which has its drafter or has not; which one begins changes from round to
round. A ratio is the median over rounds of the ratio within a round. Timing begins when every
request has its first token.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from models import SHAPES, folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail.engine.speculation import Speculation
from dovetail_bench.machine import machine

PASSAGE = """\
class Stack:
    def __init__(self, items=None):
        self.items = list(items or [])

    def push(self, item):
        self.items.append(item)

    def pop(self):
        return self.items.pop()

    def peek(self):
        return self.items[-1]

    def __len__(self):
        return len(self.items)

"""
MODULES = "json", "pickle", "marshal", "shelve", "dbm", "sqlite3", "zlib", "gzip"
TABLE = "".join(f"    '{name}': '{name}',\n" for name in MODULES)
COPIES = (
    PASSAGE + PASSAGE + "class Stack:\n",
    TABLE + TABLE + "    'json'",
    "import os\nimport sys\nimport os\nimport sys\n",
)
SECONDS = 0.12
"""Of one side in one round, at least."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--drafter", default="ngram")
    parser.add_argument("--models", nargs="+", default=["demo", "c", "a"])
    parser.add_argument("--sequences", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument(
        "--tokens",
        type=int,
        default=160,
        help="of an answer; of 16 and more requests at a time at most 64",
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--overlap", action="store_true")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    results = []
    for key in args.models:
        model = key if key == "demo" else folder_of(key)
        name = "demo" if key == "demo" else SHAPES[key][1]
        with LLM(
            model,
            device="cpu",
            overlap=args.overlap,
            kv_cache={"memory_gb": 2},
            max_model_len=1024,
            prefix_cache="none",
            speculation=args.drafter,
            worker={"use": "torch", "num_threads": args.threads},
        ) as llm:
            speculation = llm.engine.speculation
            assert speculation is not None
            costs = getattr(speculation.policy, "costs", None)
            if costs is not None:
                print(
                    f"{name}: ms of a step by sequences",
                    {n: round(1e3 * t, 3) for n, t in costs.plain.points.items()},
                )
                for num_seqs, curve in costs.drafted.items():
                    shown = {n: round(1e3 * t, 3) for n, t in curve.points.items()}
                    print(f"  with drafts, {num_seqs} sequences:", shown, flush=True)
            cases = [
                ("copy", 1, 0.0),
                *(("random", n, 1.0) for n in args.sequences),
                ("greedy", 1, 0.0),
                ("greedy", 16, 0.0),
            ]
            for workload, count, temperature in cases:
                result = compare(
                    llm, speculation, key, workload, count, temperature, args.rounds, args.tokens
                )
                results.append({"model": name, "workload": workload, "sequences": count, **result})
                print(
                    name,
                    workload,
                    count,
                    " ".join(f"{k} {v:.4g}" for k, v in result.items() if k != "ratios"),
                    flush=True,
                )
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "results": results}, indent=1, ensure_ascii=False) + "\n"
        )


def compare(
    llm: LLM,
    speculation: Speculation,
    key: str,
    workload: str,
    count: int,
    temperature: float,
    num_rounds: int,
    num_tokens: int,
) -> dict[str, Any]:
    rates: dict[str, list[float]] = {"drafting": [], "without": []}
    drafted = accepted = steps = tokens = 0
    for i in range(num_rounds + 1):
        for side in ("drafting", "without")[:: 1 if i % 2 else -1]:
            llm.engine.speculation = speculation if side == "drafting" else None
            before = llm.engine.snapshot()
            begun = (
                before.num_draft_tokens,
                before.num_accepted_tokens,
                before.num_steps,
                before.num_generation_tokens,
            )
            length = min(num_tokens, 160 if count < 16 else 64)
            rates[side].append(
                rate(llm, prompts(key, workload, count, i, llm), temperature, length, i)
            )
            after = llm.engine.snapshot()
            if side == "drafting":
                drafted += after.num_draft_tokens - begun[0]
                accepted += after.num_accepted_tokens - begun[1]
                steps += after.num_steps - begun[2]
                tokens += after.num_generation_tokens - begun[3]
    ratios = [a / b for a, b in zip(rates["drafting"], rates["without"], strict=True)][
        1:
    ]  # the first warms up
    return {
        "ratio": statistics.median(ratios),
        "drafting": statistics.median(rates["drafting"][1:]),
        "without": statistics.median(rates["without"][1:]),
        "drafted": drafted,
        "accepted": accepted,
        "tokens per step": tokens / steps,
        "ratios": [round(r, 4) for r in ratios],
    }


def prompts(key: str, workload: str, count: int, number: int, llm: LLM) -> list[list[int]]:
    if workload == "copy" and key == "demo":
        assert llm.tokenizer is not None
        return [llm.tokenizer.encode(text) for text in COPIES]
    return [prompt(32, 1000 * number + i) for i in range(3 if workload == "copy" else count)]


def rate(llm: LLM, texts: list[list[int]], temperature: float, num_tokens: int, seed: int) -> float:
    """Tokens per second, over as many repetitions as `SECONDS` need. Of `copy`, one request after
    the other."""
    at_once = len(texts) if len(texts) != 3 else 1
    seconds, tokens = 0.0, 0
    while seconds < SECONDS:
        for first in range(0, len(texts), at_once):
            params = SamplingParams(
                max_tokens=num_tokens, temperature=temperature, ignore_eos=True, seed=seed
            )
            took, made = decode(llm, texts[first : first + at_once], params)
            seconds, tokens = seconds + took, tokens + made
        seed += 1000
    return tokens / seconds


def decode(llm: LLM, texts: list[list[int]], params: SamplingParams) -> tuple[float, int]:
    engine, begun, began, made = llm.engine, set[str](), 0.0, 0
    for text in texts:
        engine.add(llm._maker.make(text, params))
    while engine.has_work:
        outputs = engine.step()
        if began:
            made += sum(len(output.token_ids) for output in outputs)
        else:
            begun |= {output.request_id for output in outputs}
            began = time.perf_counter() if len(begun) == len(texts) else 0.0
    return time.perf_counter() - began, made


if __name__ == "__main__":
    main()
