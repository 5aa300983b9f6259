"""What a quantized model asks of the matmul extension point: what its own checkpoint and options
need, and no more."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dovetail.composition.resolution import resolve
from dovetail.errors import PluginError
from dovetail.interfaces.matmul import MatmulCapabilities
from dovetail.plugin.config import load_config
from dovetail.plugin.discovery import Offer, Registry, load_registry
from dovetail.plugin.provider import Options, Provider

CHECKPOINTS = Path(__file__).parent / "checkpoints"
NAME = "kit-matmul"


def registry_with(codes: tuple[Any, ...], inputs: tuple[Any, ...]) -> Registry:
    """With a matmul provider that multiplies by some codes only."""
    registry = load_registry()
    matmul: Provider[object] = Provider(
        NAME,
        "for tests",
        lambda context, options: None,
        Options,
        MatmulCapabilities(codes=codes, inputs=inputs),
    )
    offers = [*registry.offers, Offer("matmul", matmul, registry.of("matmul")[0].plugin)]
    return replace(registry, offers=offers)


def refusal(codes: tuple[str, ...], inputs: tuple[str, ...], **values: Any) -> str | None:
    """Why it cannot multiply for a model; None if it can."""
    try:
        plan = resolve(
            load_config(device="cpu", matmul=NAME, **values), registry_with(codes, inputs)
        )
    except PluginError as e:
        return e.message
    assert plan.choices["matmul"].provider == NAME
    return None


INT8, UINT4, FLOAT8 = ("int8",), ("uint4",), ("float8_e4m3fn",)


@pytest.mark.parametrize(
    ("checkpoint", "codes", "inputs"),
    [
        ("ct_int8_w8a8_rtn", INT8, INT8),
        ("ct_fp8_dynamic", FLOAT8, FLOAT8),
        ("gptq_w4_g128_sym", UINT4, ()),
    ],
)
def test_a_checkpoint_needs_what_its_layers_are_stored_in(
    checkpoint: str, codes: tuple[str, ...], inputs: tuple[str, ...]
) -> None:
    model = str(CHECKPOINTS / checkpoint)
    assert refusal(codes, inputs, model=model) is None
    others = tuple({*INT8, *UINT4, *FLOAT8} - {*codes})
    assert f"{codes[0]} weights are not supported" in (refusal(others, inputs, model=model) or "")
    if inputs:
        assert f"{inputs[0]} inputs are not supported" in (refusal(codes, (), model=model) or "")


@pytest.mark.parametrize(("scheme", "codes"), [("int8", INT8), ("fp8", FLOAT8)])
def test_inputs_that_are_not_rounded_need_nothing(scheme: str, codes: tuple[str, ...]) -> None:
    values = {"model": "demo", "quantization": {"use": scheme, "activations": "none"}}
    assert refusal(codes, (), **values) is None
    values["quantization"] = {"use": scheme, "activations": "dynamic"}
    assert f"{codes[0]} inputs are not supported" in (refusal(codes, (), **values) or "")


def test_needs_that_fail_name_the_provider() -> None:
    registry = load_registry()

    def broken(context: Any, options: Any) -> Any:
        raise ZeroDivisionError("oops")

    offers = [
        replace(o, provider=replace(o.provider, needs=broken)) if o.provider.name == "int8" else o
        for o in registry.offers
    ]
    with pytest.raises(
        PluginError, match=r"int8: its function `needs` raised ZeroDivisionError: oops"
    ):
        resolve(
            load_config(model="demo", device="cpu", quantization="int8"),
            replace(registry, offers=offers),
        )
