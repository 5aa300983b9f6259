"""The machine and its bounds, and what each plugin says of it."""

from __future__ import annotations

import importlib.metadata
import importlib.util

from rows import DRY, Row, Rows, copy_bandwidth, matrix_rate

from dovetail.facts import device_facts
from dovetail.plugins.discovery import load_registry
from dovetail.provider import Context


def run(rows: Rows) -> None:
    facts = device_facts()
    rows.about["gpus"] = [vars(gpu) for gpu in facts.gpus]
    rows.about["gpu_trouble"] = facts.gpu_trouble
    for name in ("triton", "numpy", "transformers", "flashinfer-python"):
        rows.about[name] = importlib.metadata.version(name) if importlib.util.find_spec(name.split("-")[0]) else "missing"
    context = Context(facts, None, "cpu" if DRY else "cuda:0", "bfloat16")
    rows.about["why_not"] = {
        offer.qualified_name: [str(reason) for reason in offer.provider.why_not(context)]
        for offer in load_registry().offers
        if offer.socket in ("attention", "matmul") and "cuda" in offer.provider.capabilities.devices
    }
    rows.add(Row("device copy, read and written", copy_bandwidth() / 1e9, "GB/s"))
    rows.add(Row("bfloat16 matrix product", matrix_rate() / 1e12, "TFLOP/s"))
