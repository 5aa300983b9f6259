"""Describe the machine and the plan, without which a measurement means nothing."""

from __future__ import annotations

import platform
from pathlib import Path
from typing import Any

from dovetail.facts import device_facts
from dovetail.plan import Plan

# CPU flags that determine which GEMM and attention kernels can run.
FLAGS = (
    "avx2",
    "avx_vnni",
    "avx512f",
    "avx512_vnni",
    "avx512_bf16",
    "avx512_fp16",
    "amx_bf16",
    "amx_int8",
    "amx_fp16",
    "asimd",
    "asimddp",
    "bf16",
    "i8mm",
    "sve",
    "sve2",
)


def machine() -> dict[str, Any]:
    facts = device_facts()
    return {
        "cpu": cpu_name(),
        "num_cores": facts.num_cores,
        "memory_gib": round(facts.memory_bytes / 2**30, 1),
        "num_gpus": facts.num_gpus,
        "flags": [f for f in FLAGS if f in facts.cpu_flags],
        "system": f"{facts.system} {facts.machine}",
        "python": platform.python_version(),
    }


def cpu_name() -> str:
    """Return the CPU name from the operating system, or the architecture if there is none."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    names = (
        line.partition(":")[2].strip()
        for line in text.splitlines()
        if line.startswith("model name")
    )
    return next(names, "") or platform.processor() or platform.machine()


def in_words(machine: dict[str, Any]) -> str:
    return f"{machine['cpu']}, {machine['num_cores']} cores"


def plan_summary(plan: Plan) -> dict[str, Any]:
    """Return the parts of the plan that determine speed. A model folder is given by its name only,
    so that results can be published."""
    return {
        "fingerprint": plan.fingerprint,
        "model": display_name(plan.model),
        "architecture": plan.architecture,
        "device": plan.device,
        "dtype": plan.dtype,
        "overlap": plan.overlap,
        "choices": {
            extension_point: {
                "provider": c.provider,
                "distribution": f"{c.distribution} {c.version}",
                "options": c.options,
            }
            for extension_point, c in plan.choices.items()
        },
    }


def display_name(model: str) -> str:
    return Path(model).name if Path(model).is_dir() else model
