"""Models of the bridge with and without torch.compile (`worker: {execution: compiled}`): both
loaded, rounds in turn.

bf16, the same prompts and threads.

    python benchmarks/bridge_compile.py [--models d,e] [--rounds 7] [--threads 2] [--json FILE]

Prints medians of each side and the median of the ratios of successive rounds, and how long an
engine takes to start: without compiling, with an empty cache, and with a filled one (each in a
process of its own).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from models import SHAPES, folder_of, prompt
from rich.console import Console
from rich.table import Table

from dovetail import LLM, SamplingParams

BATCH = 16


def engine(key: str, threads: int, compile: bool) -> LLM:
    worker = {"num_threads": threads, "execution": "compiled" if compile else "plain"}
    return LLM(folder_of(key), device="cpu", max_model_len=2048, worker=worker)


def seconds(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """To complete all prompts at once."""
    began = time.perf_counter()
    outputs = llm.generate(
        prompts, SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    )
    spent = time.perf_counter() - began
    assert all(len(o.token_ids) == num_tokens for o in outputs)
    return spent


def ttft(llm: LLM, seed: int) -> float:
    return 1e3 * seconds(llm, [prompt(128, seed)], 1)


def decode(llm: LLM, seed: int) -> float:
    first = seconds(llm, [prompt(128, seed)], 1)
    return 64 / (seconds(llm, [prompt(128, seed)], 65) - first)


def batch(llm: LLM, seed: int) -> float:
    return BATCH * 64 / seconds(llm, [prompt(128, 1000 * seed + i) for i in range(BATCH)], 64)


CASES = {
    # name: (whether less is better, how to measure one side in one round)
    "TTFT of 128 tokens, ms": (True, ttft),
    "decode, tokens/s": (False, decode),
    f"{BATCH} requests × (128 + 64), output tokens/s": (False, batch),
}


def measure(key: str, threads: int, rounds: int) -> list[dict[str, Any]]:
    rows = []
    with engine(key, threads, False) as plain, engine(key, threads, True) as compiled:
        for name, (less_is_better, run) in CASES.items():
            run(plain, 0), run(compiled, 0)  # warm up
            pairs = []
            for i in range(1, rounds + 1):  # who goes first alternates
                first, second = (plain, compiled) if i % 2 else (compiled, plain)
                a, b = run(first, i), run(second, i)
                pairs.append((a, b) if i % 2 else (b, a))
            ratios = [(a / b if less_is_better else b / a) for a, b in pairs]
            rows.append(
                {
                    "model": SHAPES[key][1],
                    "case": name,
                    "plain": statistics.median(a for a, _ in pairs),
                    "compiled": statistics.median(b for _, b in pairs),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
            )
            Console(stderr=True).print(f"{key} {name}: {rows[-1]['ratio']:.2f} ×")
    return rows


def start(key: str, threads: int) -> dict[str, Any]:
    """Seconds from nothing to a warm engine, after the imports."""

    def run(compile: bool, cache: str) -> float:
        code = (
            "import time, bridge_compile as b, dovetail_models_transformers.bridge; t ="
            f" time.perf_counter()\nwith b.engine({key!r}, {threads}, {compile}): print('took',"
            " time.perf_counter() - t)"
        )
        env = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": cache}
        here = Path(__file__).parent
        out = subprocess.run(
            [sys.executable, "-c", code],
            cwd=here,
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        return float(out.stdout.split("took")[1])

    with tempfile.TemporaryDirectory() as cache:
        figures = {
            "plain": run(False, cache),
            "empty cache": run(True, cache),
            "filled cache": run(True, cache),
        }
    return {"model": SHAPES[key][1], "start, s": figures}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="d,e")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    keys = args.models.split(",")
    for key in keys:
        folder_of(key)
    starts = [start(key, args.threads) for key in keys]
    rows = [row for key in keys for row in measure(key, args.threads, args.rounds)]
    table = Table(
        "model", "case", "plain", "compiled", "times better", box=None, header_style="bold"
    )
    for r in rows:
        table.add_row(
            r["model"],
            r["case"],
            *(f"{r[k]:.1f}" for k in ("plain", "compiled")),
            f"{r['ratio']:.2f}",
        )
    Console(width=140).print(table)
    for s in starts:
        print(
            f"{s['model']}: starts in "
            + ", ".join(f"{v:.1f} s ({k})" for k, v in s["start, s"].items())
        )
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "threads": args.threads,
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({"about": about, "rows": rows, "starts": starts}, indent=1))


if __name__ == "__main__":
    main()
