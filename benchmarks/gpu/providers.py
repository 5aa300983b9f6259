"""Providers for GPUs as the engine builds them, outside of an engine."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from rows import DEVICE, DRY, INTERPRETED

from dovetail.assembly.compose import PlanContext
from dovetail.facts import DeviceFacts, device_facts
from dovetail.plugin.discovery import load_registry
from dovetail.plugin.provider import Context, Provider
from dovetail_testing.contract import KIT_MODEL

F8 = "float8_e4m3fn"
FLASHINFER_KERNELS = {
    "dtypes": ("bfloat16",),
    "kv_dtypes": ("bfloat16", F8),
    "head_sizes": (128,),
    "sliding_window": False,
    "logit_soft_cap": False,
}
"""What aot_flashinfer.py compiles by default: other kernels would take minutes each."""


def context(**needs: Any) -> Context:
    return Context(device_facts(), None, DEVICE, "bfloat16", needs)


def usable(extension_point: str, **needs: Any) -> dict[str, Provider[Any]]:
    """Providers of an extension point that can run on this GPU, by name, the preferred one
    first."""
    facts, found = device_facts(), {}
    if not DRY and not facts.gpus:
        raise RuntimeError(f"no GPU was found by NVML: {facts.gpu_trouble}")
    for offer in load_registry().of(extension_point):
        provider: Provider[Any] = offer.provider
        if "cuda" not in (provider.capabilities.devices or ()):
            continue
        if provider.name not in INTERPRETED if DRY else provider.why_not(context(**needs)):
            continue
        if provider.name == "flashinfer":
            provider = replace(
                provider, capabilities=replace(provider.capabilities, **FLASHINFER_KERNELS)
            )
        found[provider.name] = provider
    return dict(sorted(found.items(), key=lambda item: -item[1].priority))


def build(provider: Provider[Any]) -> Any:
    plan: Any = type("Plan", (), {"device": DEVICE})
    facts: DeviceFacts = device_facts()
    return provider.build(PlanContext(plan, load_registry(), facts, KIT_MODEL), provider.options())
