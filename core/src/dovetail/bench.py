"""`dovetail bench`: throughput and latency of an engine in this process, and of a running server over HTTP."""

from __future__ import annotations

import argparse
import asyncio
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
    """Streamed completions against a running server."""
    try:
        return asyncio.run(_drive_server(args, seed))
    except ImportError:
        raise ConfigError("bench serve needs aiohttp: pip install 'dovetail-core[bench]'") from None


async def _drive_server(args: argparse.Namespace, seed: int) -> Results:
    """`concurrency` clients send streamed completions one after another until `num_requests` are done."""
    import aiohttp

    ttft: list[float] = []
    gaps: list[float] = []
    queue = iter(range(args.num_requests))

    async def client(session: aiohttp.ClientSession, model: str) -> None:
        for i in queue:
            body = {
                "model": model, "prompt": prompt_of(args.input_len, 1000 * seed + i, 4000), "stream": True,
                "max_tokens": args.output_len, "temperature": 0, "ignore_eos": True,
            }  # fmt: skip
            began = time.perf_counter()
            async with session.post(f"{args.url}/v1/completions", json=body) as response:
                if response.status != 200:
                    raise ConfigError(f"the server answered {response.status}: {await response.text()}")
                last = None
                async for line in response.content:
                    if line.startswith(b"data: {"):
                        now = time.perf_counter()
                        if last is None:
                            ttft.append(now - began)
                        else:
                            gaps.append(now - last)
                        last = now

    async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=None)) as session:
        try:
            async with session.get(f"{args.url}/v1/models") as response:
                model = args.model or (await response.json())["data"][0]["id"]
        except aiohttp.ClientError as e:
            raise ConfigError(f"no server at {args.url}: {e}") from None
        began = time.perf_counter()
        await asyncio.gather(*(client(session, model) for _ in range(args.concurrency)))
        seconds = time.perf_counter() - began
    gaps.sort()
    return {
        "requests/s": args.num_requests / seconds,
        "output tokens/s": args.num_requests * args.output_len / seconds,
        "TTFT p50 ms": 1e3 * statistics.median(ttft),
        "ITL p50 ms": 1e3 * statistics.median(gaps) if gaps else 0.0,
        "ITL p99 ms": 1e3 * gaps[int(0.99 * (len(gaps) - 1))] if gaps else 0.0,
    }


def _plain(args: argparse.Namespace) -> dict[str, Any]:
    return {k: v for k, v in vars(args).items() if isinstance(v, str | int | float) and not k.startswith("engine:")}
