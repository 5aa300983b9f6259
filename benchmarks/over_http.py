"""The server against the engine without one: the tiny model, streamed completions, 16 at a time.

    python benchmarks/over_http.py [--requests 200] [--concurrency 16] [--rounds 5] [--json FILE]

In turn: requests over HTTP to a running `dovetail serve`, and the same ones through `LLM.generate`
with as many batch rows.
"""

from __future__ import annotations

import argparse
import json
import re
import statistics
import subprocess
import sys
import time
from pathlib import Path

from models import folder_of

from dovetail import LLM
from dovetail_bench.load import Work, throughput_round
from dovetail_bench.over_http import serve_round


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--input-len", type=int, default=64)
    parser.add_argument("--output-len", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    model = str(folder_of("c"))
    work = Work(args.input_len, args.output_len, args.requests, args.concurrency)
    command = [
        sys.executable,
        "-m",
        "dovetail.cli.main",
        "serve",
        model,
        "--port",
        "0",
        "--max-model-len",
        "2048",
    ]
    server = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    try:
        assert server.stdout is not None
        url = next(m.group(1) for line in server.stdout if (m := re.search(r"Ready: (\S+)", line)))
        with LLM(model, scheduler={"max_num_seqs": args.concurrency}, max_model_len=2048) as llm:
            serve_round(url, model, work, 0), throughput_round(llm, work, 0)  # warm up
            rounds = []
            for i in range(args.rounds):
                served, offline = (
                    serve_round(url, model, work, i + 1),
                    throughput_round(llm, work, i + 1),
                )
                rounds.append({**served, "offline tokens/s": offline["output tokens/s"]})
                rounds[-1]["served / offline"] = (
                    served["output tokens/s"] / offline["output tokens/s"]
                )
    finally:
        server.terminate()
        server.wait(30)
    medians = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    for name, value in medians.items():
        print(f"{name:20s} {value:9.2f}")
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "requests": args.requests,
            "concurrency": args.concurrency,
        }
        args.json.write_text(
            json.dumps({"about": about, "medians": medians, "rounds": rounds}, indent=1)
        )


if __name__ == "__main__":
    main()
