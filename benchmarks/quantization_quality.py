"""What quantizing costs in quality: the demo model in each scheme, beside itself in bfloat16.

    python benchmarks/quantization_quality.py [--variants fp8,int8,…] [--out DIR] [--json FILE]

Makes the checkpoints with `dovetail quantize`, calibrated on the demo model's calibration.txt, and
asks an engine of each, as it is served: the perplexity of the held-out text, 512 tokens at a time
(of the first 64 windows, as the model's README counts; and of all, with the standard error of the
ratio to bfloat16's over the windows), and how many of the 300 questions are answered word for word.
With --variants, those alone; what the JSON file has of the others stays, with its dates.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from dovetail import LLM, SamplingParams
from dovetail.cli.main import main as dovetail
from dovetail_bench.machine import machine

DEMO = Path(__file__).parents[1] / "plugins/demo_model"
WINDOW, NUM_WINDOWS = 512, 64
VARIANTS: dict[str, tuple[str, ...]] = {
    "fp8": ("--scheme", "fp8"),
    "fp8 weight-only": ("--scheme", "fp8", "--weight-only"),
    "fp8 nearest": ("--scheme", "fp8", "--nearest"),
    "int8": ("--scheme", "int8"),
    "int8 nearest": ("--scheme", "int8", "--nearest"),
    "gptq": ("--scheme", "gptq"),
    "gptq desc_act": ("--scheme", "gptq", "--desc-act"),
    "gptq nearest": ("--scheme", "gptq", "--nearest"),
    "awq": ("--scheme", "awq"),
    "awq nearest": ("--scheme", "awq", "--nearest"),
}
PLAIN = "bfloat16"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--variants", default=",".join(VARIANTS))
    parser.add_argument(
        "--out", type=Path, help="keep the checkpoints here, and use those that are there"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.out or Path(scratch)
        results = {PLAIN: measure("demo")}
        for name in args.variants.split(","):
            made = folder / name.replace(" ", "-")
            if not (made / "config.json").exists():
                calibration = ["--calibration", str(DEMO / "calibration.txt")]
                if dovetail(
                    ["quantize", "demo", "--out", str(made), *calibration, *VARIANTS[name]]
                ):
                    sys.exit(f"{name}: could not be made")
            results[name] = measure(str(made))
            print(f"{name}: {row(results[PLAIN], results[name])}", file=sys.stderr)
    rows = {name: row(results[PLAIN], result) for name, result in results.items()}
    print(table(rows))
    if args.json:
        about = {"machine": machine(), "command": "python benchmarks/quantization_quality.py"}
        known = json.loads(args.json.read_text())["rows"] if args.json.exists() else {}
        known |= {
            name: {"date": time.strftime("%Y-%m-%d"), **found} for name, found in rows.items()
        }
        ordered = {name: known[name] for name in (PLAIN, *VARIANTS) if name in known}
        args.json.write_text(json.dumps({"about": about, "rows": ordered}, indent=1) + "\n")


def measure(model: str) -> dict[str, Any]:
    """Mean negative log-probabilities by window, the share of right answers, bytes of the
    weights."""
    questions = [json.loads(line) for line in (DEMO / "questions.jsonl").read_text().splitlines()]
    with LLM(model, device="cpu", prefix_cache="none") as llm:
        assert llm.tokenizer is not None
        tokens = llm.tokenizer.encode((DEMO / "held_out.txt").read_text())
        windows = [tokens[i : i + WINDOW + 1] for i in range(0, len(tokens) - WINDOW, WINDOW)]
        losses = []
        for out in llm.generate(windows, SamplingParams(max_tokens=0, prompt_logprobs=0)):
            assert out.prompt_logprobs is not None
            ids = out.prompt_token_ids
            losses.append(
                -statistics.fmean(
                    p[ids[i]] for i, p in enumerate(out.prompt_logprobs) if p is not None
                )
            )
        prompts = [llm.chat_prompt([{"role": "user", "content": q["question"]}]) for q in questions]
        answers = llm.generate(prompts, SamplingParams(max_tokens=160, temperature=0))
        right = statistics.fmean(
            a.text.strip() == q["answer"].strip() for a, q in zip(answers, questions, strict=True)
        )
        size = sum(f.stat().st_size for f in Path(llm.plan.folder).glob("*.safetensors"))
    return {"losses": losses, "right": right, "bytes": size}


def row(plain: dict[str, Any], found: dict[str, Any]) -> dict[str, float]:
    differences = [b - a for a, b in zip(plain["losses"], found["losses"], strict=True)]
    error = statistics.stdev(differences) / math.sqrt(len(differences))
    return {
        "MB": round(found["bytes"] / 1e6, 2),
        "perplexity": round(math.exp(statistics.fmean(found["losses"][:NUM_WINDOWS])), 3),
        "ratio": round(math.exp(statistics.fmean(differences[:NUM_WINDOWS])), 4),
        "ratio_all_windows": round(math.exp(statistics.fmean(differences)), 4),
        "standard_error": round(error, 4),
        "exact_answers_percent": round(100 * found["right"], 1),
    }


def table(rows: dict[str, dict[str, float]]) -> str:
    columns = (
        "scheme",
        "weights, MB",
        "perplexity",
        "to bfloat16",
        "all windows (± standard error)",
        "exact answers",
    )
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, r in rows.items():
        error = (
            f"{r['ratio_all_windows']:.4f} ± {r['standard_error']:.4f}" if name != PLAIN else "1"
        )
        ratio = f"{r['ratio']:.4f}" if name != PLAIN else "1"
        lines.append(
            f"| {name} | {r['MB']} | {r['perplexity']} | {ratio} | {error} |"
            f" {r['exact_answers_percent']} % |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
