"""The contracts of all that is for GPUs, on one. In a dry run, a few checks of each, interpreted."""

from __future__ import annotations

from dataclasses import replace

import pytest
from rows import DEVICE as TORCH_DEVICE
from rows import DRY, INTERPRETED

from dovetail.facts import device_facts
from dovetail.plugins.discovery import load_registry
from dovetail.provider import Context
from dovetail.testing.contracts import contract_of

DEVICE = str(TORCH_DEVICE)
SOCKETS = ("attention", "matmul", "quantization", "worker")

COMPILED = {
    "flashinfer": {
        "dtypes": ("bfloat16",), "kv_dtypes": ("bfloat16", "float8_e4m3fn"), "head_sizes": (128,),
        "sliding_window": False, "logit_soft_cap": False,
    },
}  # fmt: skip
"""What is tried of a provider whose kernels take minutes to compile: those of aot_flashinfer.py."""


def classes():
    """A contract for each provider that declares GPUs and is usable on this one, as pytest wants it: a class."""
    registry, found = load_registry(), {}
    for offer in registry.offers:
        provider, can = offer.provider, offer.provider.capabilities
        devices = getattr(can, "devices", None)
        if offer.socket not in SOCKETS or (offer.socket != "worker" and devices is not None and "cuda" not in devices):
            continue
        if DRY and offer.socket in ("attention", "matmul") and provider.name not in INTERPRETED:
            continue  # no kernels for a CPU
        if offer.socket != "worker" and provider.why_not(Context(device_facts(), None, DEVICE, "bfloat16")):
            continue
        if DRY and devices is not None:
            provider = replace(provider, capabilities=replace(can, devices=("cpu", "cuda")))
        elif provider.name in COMPILED:
            provider = replace(provider, capabilities=replace(can, **COMPILED[provider.name]))
        base = contract_of(registry.sockets[offer.socket])
        name = "Test" + "".join(part.title() for part in (offer.socket, *provider.name.replace("_", "-").split("-")))
        found[name] = type(name, (base,), {"provider": provider, "device": DEVICE, "__module__": __name__})
    return found


if DRY or device_facts().gpus:
    globals().update(classes())
else:

    def test_there_is_a_gpu():
        pytest.skip("there is no GPU")
