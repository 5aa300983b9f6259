"""What `dovetail quantize` writes as AWQ and GPTQ, read by gptqmodel and by transformers: `make
interop`.

    python tests/interop/ours.py --theirs PYTHON

A small Llama of random weights is quantized in every form that the command has. Logits of the
libraries, which compute in 16 bits, and of an engine are compared with those of plain weights,
which an independent program reads from the same files. Writes benchmarks/results/interop.json.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import transformers
from theirs import PROMPT
from torch import Tensor

from dovetail import LLM, SamplingParams
from dovetail.cli.main import main as dovetail
from dovetail_bench.machine import machine
from dovetail_testing.plugin import make_model

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks/results/interop.json"
sys.path.insert(0, str(ROOT / "plugins/quantize/tests"))
import unpacking  # noqa: E402  (of the plugin's tests)

FORMS: dict[str, tuple[str, ...]] = {
    "gptq": ("--scheme", "gptq"),
    "gptq-g64-desc-act": ("--scheme", "gptq", "--group-size", "64", "--desc-act"),
    "gptq-asymmetric": ("--scheme", "gptq", "--asymmetric"),
    "gptq-8-bits": ("--scheme", "gptq", "--bits", "8"),
    "gptq-8-bits-asymmetric": (
        "--scheme",
        "gptq",
        "--bits",
        "8",
        "--group-size",
        "32",
        "--asymmetric",
    ),
    "awq": ("--scheme", "awq"),
    "awq-g64": ("--scheme", "awq", "--group-size", "64"),
}
LIMIT = 0.015
"""Of the norm of the logits' differences: what 16 bits cost here."""
OURS = 1e-3
"""In float32: of log-probabilities, absolute."""


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--theirs",
        required=True,
        metavar="PYTHON",
        help="of the environment with tests/interop/requirements.txt",
    )
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folders = make(Path(scratch))
        expected = {folder.name: plain(folder) for folder in folders}
        out = Path(scratch) / "theirs.json"
        command = [
            args.theirs,
            str(Path(__file__).with_name("theirs.py")),
            str(out),
            *map(str, folders),
        ]
        done = subprocess.run(
            command,
            env={**os.environ, "PYTHONPATH": "", "GPTQMODEL_CPU_WORKERS": "2"},
            stdout=subprocess.DEVNULL,
        )
        if done.returncode:
            sys.exit(f"{' '.join(command[:2])} failed")
        theirs = json.loads(out.read_text())
        rows = [compared(read, expected[read["folder"]]) for read in theirs["reads"]]
        rows += [
            {"form": f.name, "reader": "dovetail", **own(f, expected[f.name])} for f in folders
        ]
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    about = {
        "date": time.strftime("%Y-%m-%d"),
        "commit": commit,
        "machine": machine(),
        "versions": theirs["versions"],
        "command": "make interop",
        "limit": LIMIT,
    }
    RESULTS.write_text(json.dumps({"about": about, "rows": rows}, indent=1) + "\n")
    for row in rows:
        print(row)
    return 0 if all(row["passed"] for row in rows) else 1


def make(scratch: Path) -> list[Path]:
    """A folder for each form."""
    torch.manual_seed(20260101)
    source = make_model(scratch / "model")
    model = transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=261,
            hidden_size=256,
            intermediate_size=512,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=128,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
            tie_word_embeddings=False,
        )
    )
    for parameter in model.parameters():  # spread the logits: freshly made ones are nearly equal
        parameter.data *= 4 if parameter.dim() > 1 else 1
    model.save_pretrained(source)
    text = scratch / "text.txt"
    text.write_text("a few words, over and over " * 200)
    for form, arguments in FORMS.items():
        sizes = ("--calibration", str(text), "--num-samples", "16", "--sample-len", "64")
        if dovetail(["quantize", str(source), "--out", str(scratch / form), *sizes, *arguments]):
            sys.exit(f"{form}: could not be made")
    return [scratch / form for form in FORMS]


@torch.inference_mode()
def plain(folder: Path) -> Tensor:
    """f32[len(PROMPT), vocab]: of plain weights, in float32."""
    config = json.loads((folder / "config.json").read_text())
    del config["quantization_config"]
    model = transformers.AutoModelForCausalLM.from_config(
        transformers.AutoConfig.for_model(**config), dtype=torch.float32
    )
    assert not model.load_state_dict(unpacking.read(folder), strict=False).missing_keys
    found: Tensor = model.eval()(torch.tensor([PROMPT])).logits[0]
    return found


def compared(read: dict[str, Any], expected: Tensor) -> dict[str, Any]:
    row = {"form": read["folder"], "reader": read["reader"]}
    if "error" in read:
        return {**row, "error": read["error"], "passed": False}
    logits = torch.tensor(read["logits"])
    error = float((logits - expected).norm() / expected.norm())
    same = float(logits.argmax(-1).eq(expected.argmax(-1)).float().mean())
    return {
        **row,
        "linear": read["linear"],
        "error": round(error, 5),
        "same_top1": same,
        "passed": error < LIMIT and same == 1,
    }


def own(folder: Path, expected: Tensor) -> dict[str, Any]:
    with LLM(folder, dtype="float32", device="cpu") as llm:
        (out,) = llm.generate(
            PROMPT, SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
        )
    assert out.prompt_logprobs is not None
    wanted = expected.log_softmax(-1)
    pairs = (
        (p[PROMPT[i + 1]], wanted[i, PROMPT[i + 1]])
        for i, p in enumerate(out.prompt_logprobs[1:])
        if p is not None
    )
    error = max(abs(found - float(right)) for found, right in pairs)
    return {"largest_logprob_error": round(error, 7), "passed": error < OURS}


if __name__ == "__main__":
    sys.exit(main())
