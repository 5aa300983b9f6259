"""What a model takes in memory in each scheme, beside what the format promises from the
checkpoint's headers alone.

    python benchmarks/quantization_memory.py [--models b] [--schemes bf16 fp8 int8 gptq]
        [--rounds 3] [--json FILE]

Each in a process of its own, which first starts the same engine with a tiny model, so that what is
loaded once (torch, kernels, threads) is there. Then, for the model itself:

- `promised`: bytes of the linear layers, as `dovetail explain` says them before a weight is read,
  and of what is no linear layer, as it is stored.
- `resident`: by how much anonymous memory grew when the engine was ready and had answered a
  request; a KV cache of 128 tokens and the buffers of a step are in it.
- `mapped`: by how much resident pages of files grew. They can be taken back at any time.
- `peak`: the most anonymous memory while it was loading, sampled every 2 ms.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import struct
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

from models import SHAPES, folder_of, gptq_folder_of, prompt

from dovetail import LLM, SamplingParams
from dovetail.assembly.compose import weights_of
from dovetail.composition.resolution import resolve
from dovetail.plugin.config import load_config
from dovetail_bench.machine import machine

SCHEMES: dict[str, Any] = {
    "bf16": "none",
    "fp8": "fp8",
    "int8": "int8",
    "gptq": "auto",
    "int8+head": [{"match": "lm_head", "use": "int8"}, {"match": "*", "use": "int8"}],
}
TINY = "c"
LENGTH = 128
MIB = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", choices=SHAPES, default=["b"])
    parser.add_argument("--schemes", nargs="+", choices=SCHEMES, default=list(SCHEMES))
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path)
    parser.add_argument(
        "--here",
        nargs=2,
        type=Path,
        metavar=("TINY", "MODEL"),
        help="folders: measure once, in this process",
    )
    args = parser.parse_args()
    if args.here:
        print(json.dumps(measured(*args.here, args.schemes[0])))
        return
    rows = [row(key, scheme, args.rounds) for key in args.models for scheme in args.schemes]
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "machine": machine(),
            "command": "python " + " ".join(sys.argv),
        }
        args.json.write_text(
            json.dumps({"about": about, "rows": rows}, indent=1, ensure_ascii=False) + "\n"
        )


def row(key: str, scheme: str, num_rounds: int) -> dict[str, Any]:
    rounds = [
        in_a_process(folder(TINY, scheme), folder(key, scheme), scheme) for _ in range(num_rounds)
    ]
    found = {name: statistics.median(r[name] for r in rounds) for name in rounds[0]}
    off = found["resident"] / found["promised"] - 1
    words = f"{SHAPES[key][1]:20s} {scheme:10s} " + "  ".join(
        f"{name} {value / MIB:6.0f}" for name, value in found.items()
    )
    print(f"{words} MiB  resident {off:+.1%}", flush=True)
    return {
        "model": SHAPES[key][1],
        "scheme": scheme,
        **{name: value / MIB for name, value in found.items()},
        "off": off,
    }


def in_a_process(tiny: Path, model: Path, scheme: str) -> dict[str, int]:
    command = [sys.executable, __file__, "--schemes", scheme, "--here", str(tiny), str(model)]
    found: dict[str, int] = json.loads(subprocess.check_output(command, text=True).splitlines()[-1])
    return found


def folder(key: str, scheme: str) -> Path:
    return gptq_folder_of(key) if scheme == "gptq" else folder_of(key)


def measured(tiny: Path, model: Path, scheme: str) -> dict[str, int]:
    """In bytes. For a process that has done nothing else."""
    values: dict[str, Any] = {
        "device": "cpu",
        "quantization": SCHEMES[scheme],
        "max_model_len": LENGTH // 2,
        "prefix_cache": "none",
    }
    with LLM(str(tiny), **values, kv_cache=cache(tiny)) as llm:
        llm.generate([prompt(4, 0)], SamplingParams(max_tokens=2))
    del llm
    gc.collect()
    before = pages()
    with Peak() as peak, LLM(str(model), **values, kv_cache=cache(model)) as llm:
        peak.stop()
        llm.generate([prompt(4, 0)], SamplingParams(max_tokens=2))
        gc.collect()
        after = pages()
    return {
        "promised": promise(model, values),
        "resident": after["RssAnon"] - before["RssAnon"],
        "mapped": after["RssFile"] - before["RssFile"],
        "peak": peak.most - before["RssAnon"],
    }


def cache(model: Path) -> dict[str, float]:
    """As small as it can be: `LENGTH` tokens."""
    config = json.loads((model / "config.json").read_text())
    per_token = 4 * config["num_hidden_layers"] * config["num_key_value_heads"] * config["head_dim"]
    return {"memory_gb": LENGTH * per_token / 2**30}


def promise(model: Path, values: dict[str, Any]) -> int:
    """Bytes of a model's weights, from headers alone."""
    stored = header(model)
    layers = weights_of(resolve(load_config(model=str(model), **values)))
    rest = [
        nbytes for name, nbytes in stored.items() if not layers or "norm" in name or "embed" in name
    ]
    return sum(layer.nbytes for layer in layers) + sum(rest)


def header(model: Path) -> dict[str, int]:
    """Bytes of each tensor."""
    with (model / "model.safetensors").open("rb") as f:
        entries = json.loads(f.read(struct.unpack("<Q", f.read(8))[0]))
    spans = {
        name: entry["data_offsets"] for name, entry in entries.items() if name != "__metadata__"
    }
    return {name: end - begin for name, (begin, end) in spans.items()}


def pages() -> dict[str, int]:
    """Resident bytes of this process, by kind."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return {
        line.split(":")[0]: 1024 * int(line.split()[1]) for line in lines if line.startswith("Rss")
    }


class Peak:
    """The most anonymous memory between begin and `stop`, which a thread looks for."""

    def __init__(self) -> None:
        self.most, self._ended = 0, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Peak:
        self._thread.start()
        return self

    def stop(self) -> None:
        self._ended.set()
        self._thread.join()

    def __exit__(self, *_: object) -> None:
        self.stop()

    def _watch(self) -> None:
        while not self._ended.wait(0.002):
            self.most = max(self.most, pages()["RssAnon"])


if __name__ == "__main__":
    main()
