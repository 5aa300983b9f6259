"""The long runs: what `make test` takes a slice of, at length. Usage: python tests/soak.py [--scale
1.0] [NAME …]

Writes benchmarks/results/soak.json: for each run its size, seconds and outcome, the commit and the
date; for campaigns of the fault hunt also what they counted, measured and found. With names, those
runs alone; what is known of the others stays.
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

sys.path.append(str(Path(__file__).parents[1] / "core/tests"))  # as for pytest

from campaigns.table import CAMPAIGNS

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks/results/soak.json"
RUNS = {
    # name: (what, pytest arguments, environment at scale 1)
    "engine state machine": (
        (
            "2,400,000 random operations (add, abort, step) on schedulers, block manager and both"
            " loops"
        ),
        ["core/tests/test_builtins_conform.py", "-k", "invariant"],
        {"DOVETAIL_SOAK": 400},
    ),
    "scheduling changes no output": (
        "16,000 workloads, each sequence compared with itself alone",
        ["core/tests/test_builtins_conform.py", "-k", "changes_no_output"],
        {"DOVETAIL_SOAK": 100},
    ),
    "exact in every mix": (
        "1,800 engines against transformers: chunks, batches, blocks, preemption, loops, backends",
        ["tests/test_exactness.py", "-k", "every_mix"],
        {"DOVETAIL_SOAK": 30},
    ),
    "compiled bridge": (
        "every family of the bridge's tests through torch.compile, against transformers",
        ["plugins/models_torch/tests/test_models.py", "-k", "torch_compile"],
        {"DOVETAIL_SOAK": 1},
    ),
    "chaos": (
        "every extension point × every fault, with processes that hang and crash for each",
        ["tests/test_chaos.py"],
        {"DOVETAIL_SOAK": 1},
    ),
    "the conformance kit": (
        (
            "every sabotaged plugin over 5 seeds, caught by every check that is there for it;"
            " correct plugins over 50 seeds"
        ),
        ["tests/test_sabotage.py"],
        {"DOVETAIL_SOAK_SEEDS": 50},
    ),
    "a worker on a device behind the host": (
        "the whole worker contract on a fake device whose decode steps are recorded and replayed",
        ["plugins/worker_torch/tests/test_device_runner.py"],
        {"DOVETAIL_SOAK": 1},
    ),
    "attention for GPUs": (
        (
            "the whole attention contract of the kernels in Triton, interpreted, and in CUDA C++,"
            " its threads played by fibers"
        ),
        ["plugins/attention_cuda/tests"],
        {"DOVETAIL_SOAK_SEEDS": 1},
    ),
    "triton kernels": (
        (
            "every case of every Triton kernel compiled for sm_80, sm_90 and sm_100 by two versions"
            " of Triton; writes their table"
        ),
        ["tests/test_triton_kernels.py", "-m", "soak or not soak"],
        {},
    ),
    "the check for GPUs": (
        "its long parts on a CPU, with tiny sizes",
        ["tests/test_gpu_check.py", "-m", "soak"],
        {},
    ),
    "new plugins": (
        "a package from `dovetail new-plugin` for every extension point: all of its contract",
        ["tests/test_new_plugin.py"],
        {"DOVETAIL_SOAK": 1},
    ),
    "samples": (
        (
            "1,000,000 keyed samples in each of 42 cases against the exact distribution (χ², false"
            " alarms 1e-4, power 0.99 at 0.5 %)"
        ),
        ["plugins/worker_torch/tests/test_sampler.py", "-k", "frequencies"],
        {"DOVETAIL_SOAK": 1},
    ),
    "drafts change no output": (
        (
            "the demo model with each drafter and without, 2,002 prompts × prefix cache on and off,"
            " both loops, greedy and sampled"
        ),
        ["tests/test_drafting.py"],
        {"DOVETAIL_SOAK": 91},
    ),
    "a draft model changes no output": (
        (
            "the demo model with its draft and without, 2,002 prompts × prefix cache on and off,"
            " both loops, greedy and sampled"
        ),
        ["tests/test_draft_model.py", "-k", "drafts_change_nothing"],
        {"DOVETAIL_SOAK": 91},
    ),
    **{
        name: (
            c.what,
            [f"tests/test_hunt.py::test_it_finds_nothing[{name}]"],
            {"DOVETAIL_SOAK_COUNT": c.full},
        )
        for name, c in CAMPAIGNS.items()
    },
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "names", nargs="*", metavar="NAME", help=f"of {', '.join(RUNS)}; default: all"
    )
    parser.add_argument("--scale", type=float, default=1.0, help="of the sizes below 1: a slice")
    args = parser.parse_args()
    if unknown := set(args.names) - set(RUNS):
        parser.error(f"no run {', '.join(map(repr, unknown))}; there are {', '.join(RUNS)}")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], cwd=ROOT, capture_output=True, text=True
    ).stdout.strip()
    known = (
        {run["name"]: run for run in json.loads(RESULTS.read_text())["runs"]}
        if RESULTS.exists()
        else {}
    )
    all_passed = True
    for name in args.names or RUNS:
        what, arguments, sizes = RUNS[name]
        env = {**os.environ, **{k: str(max(1, int(v * args.scale))) for k, v in sizes.items()}}
        print(f"{name}: {what} …", flush=True)
        report = Path(tempfile.mkdtemp()) / "report.json"
        env["DOVETAIL_SOAK_REPORT"] = str(report)
        began = time.time()
        command = [sys.executable, "-m", "pytest", "--timeout=14400", "-m", "not gpu", *arguments]
        out = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
        seconds = round(time.time() - began)
        passed = out.returncode == 0
        all_passed &= passed
        print(f"  {'passed' if passed else 'FAILED'} in {seconds} s", flush=True)
        if not passed:
            print(out.stdout[-5000:])
        about = {
            "what": what,
            "sizes": sizes,
            "scale": args.scale,
            "seconds": seconds,
            "passed": passed,
        }
        if report.exists():
            about["report"] = json.loads(report.read_text())
        known[name] = {"name": name, "commit": commit, "date": time.strftime("%Y-%m-%d"), **about}
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(
            json.dumps({"runs": [known[n] for n in RUNS if n in known]}, indent=1) + "\n"
        )
    return 0 if all_passed else 1


if __name__ == "__main__":
    sys.exit(main())
