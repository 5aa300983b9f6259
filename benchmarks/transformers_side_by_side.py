"""Dovetail beside transformers, in one process, in turn: the same models, prompts, dtype (bf16) and
threads.

    python benchmarks/transformers_side_by_side.py [--models a,b,c] [--rounds 5] [--json FILE]

Prints medians of each side and the median of the ratios of successive rounds; only the ratios
mean something on a machine that others use too.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import transformers
from models import SHAPES, folder_of, prompt
from rich.console import Console
from rich.table import Table

from dovetail import LLM, SamplingParams

BATCH = {"a": 32, "c": 64}


def ours(llm: LLM, prompts: list[list[int]], num_tokens: int) -> float:
    """Seconds to complete all prompts at once."""
    params = SamplingParams(max_tokens=num_tokens, temperature=0, ignore_eos=True)
    began = time.perf_counter()
    outputs = llm.generate(prompts, params)
    seconds = time.perf_counter() - began
    assert all(len(o.token_ids) == num_tokens for o in outputs)
    return seconds


@torch.inference_mode()
def theirs(model: Any, prompts: list[list[int]], num_tokens: int) -> float:
    """The same with `generate`, as one batch."""
    ids = torch.tensor(prompts)
    config = transformers.GenerationConfig(
        do_sample=False,
        max_new_tokens=num_tokens,
        min_new_tokens=num_tokens,
        pad_token_id=0,
        eos_token_id=None,
    )
    began = time.perf_counter()
    out = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)
    seconds = time.perf_counter() - began
    assert out.shape[1] == ids.shape[1] + num_tokens
    return seconds


def cases(key: str) -> dict[str, tuple[bool, Callable[[Callable[..., float], Any, int], float]]]:
    """By name: whether less is better, and how to measure one side in one round."""

    def ttft(run: Callable[..., float], side: Any, seed: int) -> float:
        return 1e3 * run(side, [prompt(128, seed)], 1)

    def decode(run: Callable[..., float], side: Any, seed: int) -> float:
        num_tokens = 128 if key == "c" else 32
        first = run(side, [prompt(128, seed)], 1)
        return (num_tokens - 1) / (run(side, [prompt(128, seed)], num_tokens) - first)

    out = {"TTFT of 128 tokens, ms": (True, ttft), "decode, tokens/s": (False, decode)}
    if key in BATCH:
        count = BATCH[key]

        def batch(run: Callable[..., float], side: Any, seed: int) -> float:
            return count * 64 / run(side, [prompt(128, 1000 * seed + i) for i in range(count)], 64)

        out[f"{count} requests × (128 + 64), output tokens/s"] = (False, batch)
    return out


def measure(key: str, rounds: int) -> list[dict[str, Any]]:
    folder = folder_of(key)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.bfloat16, attn_implementation="sdpa"
    ).eval()
    model.generation_config.eos_token_id = None
    rows = []
    with LLM(folder, device="cpu", max_model_len=4096) as llm:
        for name, (less_is_better, run) in cases(key).items():
            run(ours, llm, 0), run(theirs, model, 0)  # warm up
            pairs = [(run(ours, llm, i + 1), run(theirs, model, i + 1)) for i in range(rounds)]
            ratios = [(b / a if less_is_better else a / b) for a, b in pairs]
            rows.append(
                {
                    "model": SHAPES[key][1],
                    "case": name,
                    "dovetail": statistics.median(a for a, _ in pairs),
                    "transformers": statistics.median(b for _, b in pairs),
                    "ratio": statistics.median(ratios),
                    "ratios": ratios,
                }
            )
            Console(stderr=True).print(f"{key} {name}: {rows[-1]['ratio']:.2f} ×")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", default="c,a,b")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rows = [row for key in args.models.split(",") for row in measure(key, args.rounds)]
    table = Table(
        "model", "case", "Dovetail", "transformers", "times better", box=None, header_style="bold"
    )
    for r in rows:
        figures = (f"{r[k]:.1f}" for k in ("dovetail", "transformers"))
        table.add_row(r["model"], r["case"], *figures, f"{r['ratio']:.2f}")
    Console(width=140).print(table)
    if args.json:
        about = {
            "date": time.strftime("%Y-%m-%d"),
            "threads": torch.get_num_threads(),
            "machine": platform.machine(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
            "rounds": args.rounds,
        }
        args.json.write_text(json.dumps({"about": about, "rows": rows}, indent=1))


if __name__ == "__main__":
    main()
