"""How `benchmarks/peers.py` talks to an engine: a process that loads once and answers rounds, one
JSON line each.

    python drive_X.py MODEL --threads 2              rounds on stdin, answers on stdout; the
        first line says that it is ready
    python drive_X.py MODEL --threads 2 --serve 8001   becomes the engine's own HTTP server instead

    {"case": "A", "seed": 3, "num_requests": 1, "input_len": 128, "output_len": 128}
    {"TTFT ms": 5.7, "decode tokens/s": 648.1}

Standard library only: each driver runs in its engine's own environment.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

sys.path.insert(0, str(Path(__file__).parents[1]))

from models import prompt

MAX_MODEL_LEN = 2048


class Engine(Protocol):
    """One engine, its model loaded."""

    version: str

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        """Complete all prompts at once: greedy, exactly `num_tokens` each, whatever they are.
        Returns the new token ids."""


def single(engine: Engine, ask: dict[str, Any]) -> dict[str, float]:
    """Two requests after each other, one of a single token; no prompt is ever seen twice."""
    first = seconds(engine, [prompt(ask["input_len"], ask["seed"])], 1)
    whole = seconds(engine, [prompt(ask["input_len"], 500_000 + ask["seed"])], ask["output_len"])
    return {"TTFT ms": 1e3 * first, "decode tokens/s": (ask["output_len"] - 1) / (whole - first)}


def batch(engine: Engine, ask: dict[str, Any]) -> dict[str, float]:
    """All requests at once, prefill included."""
    prompts = [
        prompt(ask["input_len"], 1_000_000 + 1000 * ask["seed"] + i)
        for i in range(ask["num_requests"])
    ]
    return {
        "output tokens/s": (
            len(prompts) * ask["output_len"] / seconds(engine, prompts, ask["output_len"])
        )
    }


def seconds(engine: Engine, prompts: list[list[int]], num_tokens: int) -> float:
    began = time.perf_counter()
    tokens = engine.generate(prompts, num_tokens)
    took = time.perf_counter() - began
    assert [len(t) for t in tokens] == [num_tokens] * len(prompts), [len(t) for t in tokens]
    return took


CASES: dict[str, Callable[[Engine, dict[str, Any]], dict[str, float]]] = {"A": single, "B": batch}


def main(
    load: Callable[[str, int], Engine], server: Callable[[str, int, int], list[str]] | None = None
) -> None:
    """Run a driver. `load(model, threads)` makes the engine, `server(model, threads, port)` is its
    server's command."""
    parser = argparse.ArgumentParser()
    parser.add_argument("model")
    parser.add_argument("--threads", type=int, required=True)
    parser.add_argument("--serve", type=int, metavar="PORT")
    args = parser.parse_args()
    if args.serve is not None:
        if server is None:
            sys.exit("this engine brings no server")
        command = server(args.model, args.threads, args.serve)
        os.execv(command[0], command)
    with os.fdopen(os.dup(1), "w", buffering=1) as answers:
        os.dup2(2, 1)  # engines print what they like to stdout: that is the log now
        engine = load(args.model, args.threads)
        tokens = engine.generate([prompt(16, 1)], 1)
        answers.write(json.dumps({"version": engine.version, "first_token": tokens[0][0]}) + "\n")
        for line in sys.stdin:
            ask = json.loads(line)
            answers.write(json.dumps(CASES[ask["case"]](engine, ask)) + "\n")
