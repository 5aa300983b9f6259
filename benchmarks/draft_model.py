"""What a draft model brings: decode tokens/s of the demo model with its draft and without, side by
side in one process.

    python benchmarks/draft_model.py [--batches 1,16,64] [--num-draft-tokens 2,4,6] [--rounds 7]
        [--threads 1] [--json FILE]

Two kinds of text: answers to the questions of the demo model's set, greedy, to their end (ordinary
text); and continuations of random tokens, 64 of each (hardly a draft is right). Time is counted
from the first token that a batch gives. The sides take turns, 16 requests or one batch each, on the
same prompts; medians over rounds, and of the ratios of each round.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

from dovetail import LLM, SamplingParams
from dovetail_bench.machine import machine

NONE = "none"
REQUESTS = 16
"""Of one side in one round, at least."""
QUESTIONS = Path(__file__).parents[1] / "plugins/demo_model/questions.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--batches", default="1,16,64")
    parser.add_argument(
        "--num-draft-tokens", default="2,4,6", help="fixed numbers to compare, beside adaptive ones"
    )
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, help="of a step; default: torch's own choice")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    worker = {"num_threads": args.threads} if args.threads else "auto"
    common: dict[str, Any] = {"device": "cpu", "worker": worker, "prefix_cache": "none"}
    drafting = {"use": "draft-model", "model": "demo-draft"}
    engines = {
        NONE: LLM("demo", **common),
        "adaptive": LLM("demo", **common, speculation={**drafting, "num_draft_tokens": 6}),
    }
    for k in filter(None, args.num_draft_tokens.split(",")):
        fixed = {**drafting, "num_draft_tokens": int(k), "adaptive": False}
        engines[k] = LLM("demo", **common, speculation=fixed)
    rows = [
        row
        for n in map(int, args.batches.split(","))
        for kind in ("text", "random")
        for row in measure(engines, kind, n, args.rounds)
    ]
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        )


def measure(engines: dict[str, LLM], kind: str, batch: int, rounds: int) -> list[dict[str, Any]]:
    rng, plain = random.Random(batch), engines[NONE]
    questions = [json.loads(line)["question"] for line in QUESTIONS.read_text().splitlines()]
    rates: dict[str, list[float]] = {k: [] for k in engines}
    accepted: dict[str, list[int]] = {k: [0, 0] for k in engines}
    for _ in range(rounds + 1):  # the first warms up
        if kind == "text":
            asked = rng.sample(questions, max(batch, REQUESTS))
            prompts = [plain.chat_prompt([{"role": "user", "content": q}]) for q in asked]
        else:
            tokens = range(3, plain.tokenizer.vocab_size)
            prompts = [rng.choices(tokens, k=24) for _ in range(max(batch, REQUESTS))]
        for k, llm in engines.items():
            before = llm.engine.snapshot()
            drafted, right = before.num_draft_tokens, before.num_accepted_tokens
            params = SamplingParams(max_tokens=64, temperature=0, ignore_eos=kind == "random")
            done = [
                decode(llm, prompts[at : at + batch], params)
                for at in range(0, len(prompts), batch)
            ]
            rates[k].append(sum(count for count, _ in done) / sum(seconds for _, seconds in done))
            after = llm.engine.snapshot()
            accepted[k][0] += after.num_draft_tokens - drafted
            accepted[k][1] += after.num_accepted_tokens - right
    rows = []
    for k, values in rates.items():
        ratio = statistics.median(v / of for v, of in zip(values[1:], rates[NONE][1:], strict=True))
        share = accepted[k][1] / accepted[k][0] if accepted[k][0] else None
        rate = statistics.median(values[1:])
        rows.append(
            {
                "text": kind,
                "batch": batch,
                "num_draft_tokens": k,
                "tokens/s": rate,
                "ratio": ratio,
                "accepted": share,
            }
        )
        said = (
            f"{kind:7s}batch {batch:3d}  drafts {k:8s}  {rate:8.0f} tokens/s  {ratio:5.2f} × "
            f" accepted {share or 0:.2f}"
        )
        print(said, flush=True)
    return rows


def decode(llm: LLM, prompts: list[list[int]], params: SamplingParams) -> tuple[int, float]:
    """Tokens after the first of the batch, and seconds."""
    for prompt in prompts:
        llm.engine.add(llm._maker.make(prompt, params))
    began, count = 0.0, 0
    while llm.engine.has_work:
        tokens = sum(len(output.token_ids) for output in llm.engine.step())
        if began:
            count += tokens
        elif tokens:
            began = time.perf_counter()
    return count, time.perf_counter() - began


if __name__ == "__main__":
    main()
