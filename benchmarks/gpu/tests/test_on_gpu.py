"""The contracts of all that is for GPUs, on one. In a dry run, a few checks of each,
interpreted."""

from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
from providers import FLASHINFER_KERNELS
from rows import DEVICE, DRY, INTERPRETED

from dovetail.facts import device_facts
from dovetail.plugin.discovery import load_registry
from dovetail.plugin.provider import Context
from dovetail_testing.contracts import contract_of

EXTENSION_POINTS = ("attention", "matmul", "quantization", "worker")


def classes():
    """A contract for each provider that declares GPUs and is usable on this one, as pytest wants
    it: a class."""
    registry, found = load_registry(), {}
    for offer in registry.offers:
        provider, can = offer.provider, offer.provider.capabilities
        devices = getattr(can, "devices", None)
        if offer.extension_point not in EXTENSION_POINTS or (
            offer.extension_point != "worker" and devices is not None and "cuda" not in devices
        ):
            continue
        if (
            DRY
            and offer.extension_point in ("attention", "matmul")
            and provider.name not in INTERPRETED
        ):
            continue  # no kernels for a CPU
        if offer.extension_point != "worker" and provider.why_not(
            Context(device_facts(), None, DEVICE, "bfloat16")
        ):
            continue
        name = "Test" + "".join(
            part.title()
            for part in (offer.extension_point, *provider.name.replace("_", "-").split("-"))
        )
        base = contract_of(registry.extension_points[offer.extension_point])
        if DRY and devices is not None:
            provider = replace(provider, capabilities=replace(can, devices=("cpu", "cuda")))
        elif provider.name == "flashinfer":
            provider = replace(provider, capabilities=replace(can, **FLASHINFER_KERNELS))
        for suffix, part in pieces(offer.extension_point, provider).items():
            found[name + suffix] = type(
                name + suffix, (base,), {"provider": part, "device": DEVICE, "__module__": __name__}
            )
    return found


def pieces(extension_point, provider):
    """A provider of matmul once for each kind of codes and type of x: one check tries hundreds of
    products, and a kernel is compiled for most of them, which several processes then do at the same
    time."""
    can = provider.capabilities
    if extension_point != "matmul" or DRY:
        return {"": provider}
    found = {}
    for codes, dtype in itertools.product(can.codes, can.dtypes or ("bfloat16",)):
        name = codes.title().replace("_", "") + dtype.title()
        found[name] = replace(provider, capabilities=replace(can, codes=(codes,), dtypes=(dtype,)))
    return found


if DRY or device_facts().gpus:
    globals().update(classes())
else:

    def test_there_is_a_gpu():
        pytest.skip("there is no GPU")
