"""From process start to the first token of the tiny model, by stages, and to a server that is
ready.

    python benchmarks/start_up.py [--rounds 7] [--json FILE]

`dovetail generate` and `dovetail serve` with warm file and kernel caches. In the same rounds, what
bounds them: an empty interpreter and `import torch`. Stages end when a line, or the first text,
comes out of the process; medians of rounds.
"""

from __future__ import annotations

import argparse
import json
import os
import selectors
import statistics
import subprocess
import sys
import time
from pathlib import Path

from models import folder_of

from dovetail_bench.machine import machine

STAGES = {
    b"loading weights \xe2\x80\xa6": "imports, plan, model built",
    b"loading weights: done": "weights",
    b"warming up \xe2\x80\xa6": "KV cache",
    b"warming up: done": "warm-up",
}
"""What the process says on stderr when a stage has ended."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    one_round()  # caches
    rounds = [one_round() for _ in range(args.rounds)]
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, value in medians.items():
        print(f"{name:32s} {value:6.0f} ms")
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "ms": medians, "rounds": rounds}, indent=1)
        )


def one_round() -> dict[str, float]:
    """Milliseconds of each thing."""
    model = str(folder_of("c"))
    return {
        "python -c pass": seconds_of("-c", "pass"),
        "python -c 'import torch'": seconds_of("-c", "import torch"),
        **generate(
            "-m", "dovetail.cli.main", "generate", "--model", model, "--max-tokens", "4", "hello"
        ),
        "serve: ready": serve("-m", "dovetail.cli.main", "serve", model, "--port", "0"),
    }


def seconds_of(*arguments: str) -> float:
    began = time.perf_counter()
    subprocess.run([sys.executable, *arguments], check=True)
    return 1e3 * (time.perf_counter() - began)


def generate(*arguments: str) -> dict[str, float]:
    """The stages, then the whole; `first token` is the stage after the warm-up."""
    out: dict[str, float] = {}
    began = last = time.perf_counter()
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with (
        subprocess.Popen([sys.executable, *arguments], **pipes) as process,
        selectors.DefaultSelector() as selector,
    ):  # type: ignore[call-overload]
        selector.register(process.stdout, selectors.EVENT_READ, "stdout")
        selector.register(process.stderr, selectors.EVENT_READ, "stderr")
        said = b""
        while "generate: first token" not in out:
            for key, _ in selector.select():
                now = time.perf_counter()
                data = os.read(key.fd, 1 << 16)
                if not data:
                    raise RuntimeError(f"the process ended: {said.decode()}")
                if key.data == "stdout":
                    out["generate: first token"] = 1e3 * (now - last)
                    out["generate: from start to first token"] = 1e3 * (now - began)
                    break
                said += data
                for line, stage in STAGES.items():
                    if line in said and f"generate: {stage}" not in out:
                        out[f"generate: {stage}"] = 1e3 * (now - last)
                        last = now
        process.communicate()
    return {
        f"generate: {stage}": out.get(f"generate: {stage}", 0.0) for stage in STAGES.values()
    } | out


def serve(*arguments: str) -> float:
    began = time.perf_counter()
    with subprocess.Popen(
        [sys.executable, *arguments], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    ) as process:
        assert process.stdout is not None
        if not any(line.startswith(b"Ready:") for line in process.stdout):
            raise RuntimeError("the server ended")
        ready = 1e3 * (time.perf_counter() - began)
        process.terminate()
    return ready


if __name__ == "__main__":
    main()
