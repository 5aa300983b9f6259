"""Dovetail: see protocol.py. MODEL is a folder, or an engine config that names one."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from protocol import MAX_MODEL_LEN, main

import dovetail
from dovetail import LLM, SamplingParams


class Dovetail:
    version = dovetail.__version__

    def __init__(self, model: str, threads: int) -> None:
        source: Any = {"config": model} if Path(model).is_file() else {"model": model}
        self._llm = LLM(
            **source,
            device="cpu",
            max_model_len=MAX_MODEL_LEN,
            scheduler={"max_num_seqs": 64},
            kv_cache={"memory_gb": 2},
            worker={"use": "torch", "num_threads": threads},
        )

    def generate(self, prompts: list[list[int]], num_tokens: int) -> list[list[int]]:
        params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
        return [o.token_ids for o in self._llm.generate(prompts, params)]


def server(model: str, threads: int, port: int) -> list[str]:
    # Between its rounds the whole process group is stopped: no reason to replace the engine.
    return [
        sys.executable,
        "-m",
        "dovetail.cli.main",
        "serve",
        model,
        "--served-model-name",
        "m",
        "--port",
        str(port),
        "--max-model-len",
        str(MAX_MODEL_LEN),
        "--max-num-seqs",
        "64",
        "--kv-cache-memory-gb",
        "2",
        "--stall-timeout",
        "86400",
    ]


if __name__ == "__main__":
    main(Dovetail, server)
