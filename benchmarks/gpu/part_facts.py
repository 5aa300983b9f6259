"""The machine: versions, what each provider for GPUs says of it, and the rates that bound
everything else."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import shutil
import subprocess

import carried
from rows import DEVICE, DRY, Row, Rows, copy_bandwidth, matrix_rate

DISTRIBUTIONS = (
    "torch",
    "triton",
    "numpy",
    "transformers",
    "flashinfer-python",
    "apache-tvm-ffi",
    "pydantic",
    "pydantic-core",
    "msgspec",
    "pluggy",
    "nvidia-ml-py",
    "tokenizers",
    "pytest",
    "pytest-xdist",
    "pytest-timeout",
    "hypothesis",
)
SMI = (
    "nvidia-smi",
    "--query-gpu=name,driver_version,memory.total,memory.used,clocks.sm,clocks.mem,power.draw",
    "--format=csv",
)


def install(rows: Rows) -> None:
    rows.attempt("install", carried.install)
    rows.fact("wheels", [wheel.name for wheel in sorted(carried.WHEELS.glob("*.whl"))])


def run(rows: Rows) -> None:
    rows.attempt("versions", versions, rows)
    rows.attempt("GPU", gpu, rows)
    rows.attempt("providers", providers, rows)
    rows.attempt(
        "device copy",
        lambda: rows.add(Row("device copy, read and written", copy_bandwidth() / 1e9, "GB/s")),
    )
    rows.attempt(
        "matrix product",
        lambda: rows.add(Row("bfloat16 matrix product", matrix_rate() / 1e12, "TFLOP/s")),
    )
    rows.attempt("nvidia-smi", smi, rows)


def versions(rows: Rows) -> None:
    found = {
        "python": platform.python_version(),
        "kernel": platform.release(),
        "cores": len(os.sched_getaffinity(0)),
    }
    for name in DISTRIBUTIONS:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = "missing"
    rows.fact("versions", found)
    rows.fact(
        "programs",
        {name: shutil.which(name) for name in ("nvcc", "ncu", "compute-sanitizer", "g++", "ninja")},
    )
    rows.fact("disk free, GiB", round(shutil.disk_usage(carried.ROOT).free / 2**30, 1))


def gpu(rows: Rows) -> None:
    import torch

    rows.fact(
        "torch",
        {
            "version": torch.__version__,
            "cuda": torch.version.cuda,
            "git": torch.version.git_version[:12],
        },
    )
    if DRY:
        rows.fact("GPU", {"name": "none: a dry run"})
        return
    found = torch.cuda.get_device_properties(0)
    free, total = torch.cuda.mem_get_info(0)
    rows.fact(
        "GPU",
        {
            "name": found.name,
            "capability": [found.major, found.minor],
            "multiprocessors": found.multi_processor_count,
            "free GiB": round(free / 2**30, 2),
            "total GiB": round(total / 2**30, 2),
            "count": torch.cuda.device_count(),
        },
    )


def providers(rows: Rows) -> None:
    from dovetail.facts import device_facts
    from dovetail.plugin.discovery import load_registry
    from dovetail.plugin.provider import Context

    facts = device_facts()
    rows.fact("GPUs by NVML", [vars(gpu) for gpu in facts.gpus] or facts.gpu_trouble)
    registry, context = load_registry(), Context(facts, None, DEVICE, "bfloat16")
    for distribution, error in registry.broken.items():
        rows.failed(f"plugin {distribution}", error)
    for offer in registry.offers:
        devices = getattr(offer.provider.capabilities, "devices", None) or ()
        if offer.extension_point in ("attention", "matmul") and "cuda" in devices:
            what = f"{offer.extension_point} {offer.qualified_name}"
            try:
                rows.fact(
                    what, {"why_not": [str(reason) for reason in offer.provider.why_not(context)]}
                )
            except Exception as e:
                rows.failed(what, e)


def smi(rows: Rows) -> None:
    """After the matrix products: the clocks that the GPU runs at."""
    if shutil.which(SMI[0]):
        done = subprocess.run(SMI, capture_output=True, text=True, timeout=20, check=False)
        rows.fact("nvidia-smi", done.stdout.strip() or done.stderr.strip())
