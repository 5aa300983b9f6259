"""`dovetail bench`: throughput and latency of an engine in this process, and of a running server over HTTP."""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import track
from rich.table import Table

from dovetail.errors import ConfigError
from dovetail.llm import LLM
from dovetail.load import drive, served_model
from dovetail.types import SamplingParams

Results = dict[str, float]


def run(kind: str, args: argparse.Namespace, config_file: str | None, values: dict[str, Any]) -> int:
    """Run one kind of benchmark, print a table of medians with the spread, and write JSON if asked to."""
    if min(args.input_len, args.output_len, args.rounds) < 1:
        raise ConfigError("--input-len, --output-len and --rounds are at least 1")
    if kind == "serve":
        rounds = [serve_round(args, i) for i in track(range(args.rounds), description="measuring")]
    else:
        with LLM(config=config_file, **values) as llm:
            measure = throughput_round if kind == "throughput" else latency_round
            measure(llm, args, 0)  # warm up
            rounds = [measure(llm, args, i + 1) for i in track(range(args.rounds), description="measuring")]
    table = Table("figure", "median", "lowest", "highest", box=None, pad_edge=False, header_style="bold")
    for name in rounds[0]:
        column = [r[name] for r in rounds]
        table.add_row(name, *(f"{f(column):.2f}" for f in (statistics.median, min, max)))
    Console().print(table)
    if args.json:
        Path(args.json).write_text(json.dumps({"kind": kind, "rounds": rounds, "args": _plain(args)}, indent=2))
    return 0


def prompt_of(length: int, seed: int, vocab_size: int) -> list[int]:
    """Random token ids, the lowest ones left out: special tokens live there."""
    rng = random.Random(seed)
    return [rng.randrange(min(300, vocab_size - 1), vocab_size) for _ in range(length)]


def throughput_round(llm: LLM, args: argparse.Namespace, seed: int) -> Results:
    """All requests at once: output tokens per second, prefill included."""
    vocab = min(4000, llm.vocab_size)
    prompts = [prompt_of(args.input_len, 1000 * seed + i, vocab) for i in range(args.num_requests)]
    params = SamplingParams(max_tokens=args.output_len, temperature=0, ignore_eos=True)
    steps = llm.engine.stats.num_steps
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    num_tokens = sum(len(o.token_ids) for o in outputs)
    steps = llm.engine.stats.num_steps - steps
    return {
        "output tokens/s": num_tokens / seconds,
        "total tokens/s": (num_tokens + len(prompts) * args.input_len) / seconds,
        "ms a step": 1e3 * seconds / steps,
    }


def latency_round(llm: LLM, args: argparse.Namespace, seed: int) -> Results:
    """One request: time to first token, then decode."""
    prompt = prompt_of(args.input_len, seed, min(4000, llm.vocab_size))
    params = SamplingParams(max_tokens=args.output_len, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    times = [time.perf_counter() for delta in llm.stream(prompt, params) if delta.token_ids]
    decode = (len(times) - 1) / (times[-1] - times[0]) if len(times) > 1 else 0.0
    return {"TTFT ms": 1e3 * (times[0] - began), "decode tokens/s": decode}


def serve_round(args: argparse.Namespace, seed: int) -> Results:
    """Streamed completions against a running server, `concurrency` at a time until `num_requests` are done."""
    model = args.model or served_model(args.url)
    bodies = [
        {
            "model": model, "prompt": prompt_of(args.input_len, 1000 * seed + i, 4000), "stream": True,
            "max_tokens": args.output_len, "temperature": 0, "ignore_eos": True,
        }
        for i in range(args.num_requests)
    ]  # fmt: skip
    measured = drive(args.url, bodies, args.concurrency)
    gaps = sorted(measured.gaps)
    return {
        "requests/s": args.num_requests / measured.seconds,
        "output tokens/s": args.num_requests * args.output_len / measured.seconds,
        "TTFT p50 ms": 1e3 * statistics.median(measured.ttft),
        "ITL p50 ms": 1e3 * statistics.median(gaps) if gaps else 0.0,
        "ITL p99 ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))] if gaps else 0.0,
        "events/s": measured.num_events / measured.seconds,
    }


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if isinstance(v, str | int | float) and not k.startswith("engine:")}
