"""Quantized models beside the same model in bfloat16: decode, a batch, prompts, and memory.

    python benchmarks/quantization_speed.py [--models a b] [--schemes int8 int8-weights fp8
        gptq] [--rounds 5] [--json FILE]

All engines are in one process and take turns, on the same random prompts. Cases: `decode`, one
request of 16 + 64 tokens; `batch`, 32 of them at once; `prefill`, one prompt of 512 tokens. A ratio
is the median over rounds of the ratio within a round. `held` is what the process grew by when the
engine was made, KV cache (0.5 GiB, touched as it is used) included.

Shapes are those of models.py; gptq is 4 bits in groups of 128, of random codes. With `+head` the
output projection has 8 bits too, which else stays as it is: of small models with large vocabularies
it is a good part.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import psutil
from models import SHAPES, folder_of, gptq_folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail_bench.machine import machine

PLAIN = "bf16"
HEAD = {"match": "lm_head", "use": "int8", "activations": "none"}
SCHEMES: dict[str, Any] = {
    "int8": "int8",
    "int8+head": [HEAD, {"match": "*", "use": "int8"}],
    "int8-weights": {"use": "int8", "activations": "none"},
    "fp8": "fp8",
    "gptq": "auto",
    "gptq+head": [HEAD, {"match": "*", "use": "auto"}],
}
CASES = {"decode": (1, 16, 64), "batch": (32, 16, 64), "prefill": (1, 512, 1)}
"""Requests, tokens of each prompt, tokens of each answer."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=["a", "b"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for key in args.models for row in measure(key, args.schemes, args.rounds)]
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        )


def measure(key: str, schemes: list[str], num_rounds: int) -> list[dict[str, Any]]:
    engines: dict[str, LLM] = {}
    held: dict[str, float] = {}
    for name in (PLAIN, *schemes):
        folder = gptq_folder_of(key) if "gptq" in name else folder_of(key)
        before = psutil.Process().memory_info().rss
        engines[name] = LLM(
            str(folder),
            device="cpu",
            max_model_len=1024,
            prefix_cache="none",
            quantization=SCHEMES.get(name, "none"),
            kv_cache={"use": "paged", "memory_gb": 0.5},
        )
        engines[name].generate([prompt(4, 0)], SamplingParams(max_tokens=2))
        held[name] = (psutil.Process().memory_info().rss - before) / 2**20
    rows = []
    for case, (count, length, answer) in CASES.items():
        rates: dict[str, list[float]] = {name: [] for name in engines}
        for turn in range(num_rounds + 1):
            for name, llm in engines.items():
                rates[name].append(rate(llm, count, length, answer, turn))
        for name, values in rates.items():
            ratio = statistics.median(
                a / b for a, b in zip(values[1:], rates[PLAIN][1:], strict=True)
            )
            model, speed = SHAPES[key][1], statistics.median(values[1:])
            row = {
                "model": model,
                "case": case,
                "scheme": name,
                "tokens/s": speed,
                "ratio": ratio,
                "held MiB": held[name],
            }
            rows.append(row)
            words = (
                f"{model:20s} {case:8s} {name:14s} {speed:9.1f} tokens/s {ratio:6.2f} ×  held"
                f" {held[name]:7.0f} MiB"
            )
            print(words, flush=True)
    for llm in engines.values():
        llm.close()
    return rows


def rate(llm: LLM, count: int, length: int, answer: int, turn: int) -> float:
    """Tokens a second: of the answers after their first token; of the prompt where the answer is
    one token."""
    params = SamplingParams(max_tokens=answer, temperature=0, ignore_eos=True)
    for i in range(count):
        llm.engine.add(llm._maker.make(prompt(length, 1000 * turn + i), params))
    began, tokens, first = time.perf_counter(), 0, 0.0
    while llm.engine.has_work:
        new = sum(len(output.token_ids) for output in llm.engine.step())
        tokens += new if first else 0
        first = first or (time.perf_counter() if new else 0.0)
    return (
        tokens / (time.perf_counter() - first) if answer > 1 else count * length / (first - began)
    )


if __name__ == "__main__":
    main()
