"""The contract of quantization catches schemes that are wrong, each by the check that is for it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from sabotaged import failures
from strangers import EXAMPLES

from dovetail.interfaces.quantization import OUT, Axis, Declined, Parameter
from dovetail.provider import Provider
from dovetail.testing.quantization import QuantizationContract

CONFIG = {"quant_method": "nf4-blocks", "block_size": 32, "modules_to_not_convert": ["*.layers.3.*"]}
LEFT_OUT = ("model.layers.3.mlp.kit_proj",)


@pytest.fixture(autouse=True)
def _example(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(EXAMPLES / "quant_nf4/src")


def sabotaged(change: Callable[[type], type]) -> dict[str, Any]:
    import dovetail_quant_nf4 as package  # type: ignore[import-not-found]
    from dovetail_quant_nf4.scheme import NF4  # type: ignore[import-not-found]

    wrong = change(NF4)
    given = package.PROVIDER
    provider = Provider(
        given.name, given.summary, lambda c, o: wrong(c.model.quantization_config or {}, o.block_size), given.options,
        given.capabilities,
    )  # fmt: skip
    return failures(QuantizationContract, provider=provider, configs=(CONFIG,), declined=LEFT_OUT, weight_error=0.12)


def product(make: Callable[..., Any]) -> Callable[[type], type]:
    """A scheme whose `linear` is `x -> make(weight, bias, x, layer)`."""

    def change(base: type) -> type:
        class Wrong(base):
            def linear(self, layer: Any, tensors: Any) -> Any:
                kept = dict(tensors)
                return lambda x: make(self.dequantize(layer, kept).to(x.dtype), kept.get("bias"), x, layer)

        return Wrong

    return change


def flipped(base: type) -> type:
    class Wrong(base):
        def linear(self, layer: Any, tensors: Any) -> Any:
            return super().linear(layer, {**tensors, "codes": tensors["codes"] << 4 | tensors["codes"] >> 4})

    return Wrong


def scales_of_the_next_block(base: type) -> type:
    class Wrong(base):
        def linear(self, layer: Any, tensors: Any) -> Any:
            return super().linear(layer, {**tensors, "scales": tensors["scales"].roll(1, 1)})

    return Wrong


def scales_of_the_first_part(base: type) -> type:
    class Wrong(base):
        def linear(self, layer: Any, tensors: Any) -> Any:
            first, scales = layer.parts[0].out_features, tensors["scales"].clone()
            scales[first:] = scales[:1]
            return super().linear(layer, {**tensors, "scales": scales})

    return Wrong


def inputs_not_declared(base: type) -> type:
    class Wrong(base):
        def parameters(self, layer: Any) -> Any:
            found = super().parameters(layer)
            if isinstance(found, Declined):
                return found
            return {**found, "scales": Parameter((OUT, layer.in_features // self._block_size), "float16")}

    return Wrong


def wrong_pack_factor(base: type) -> type:
    class Wrong(base):
        def parameters(self, layer: Any) -> Any:
            found = super().parameters(layer)
            return found if isinstance(found, Declined) else {**found, "codes": Parameter((OUT, Axis("in", 4)), "uint8")}

    return Wrong


def declines_without_a_reason(base: type) -> type:
    class Wrong(base):
        def parameters(self, layer: Any) -> Any:
            return Declined("") if layer.in_features % self._block_size else super().parameters(layer)

    return Wrong


def takes_any_size(base: type) -> type:
    class Wrong(base):
        def parameters(self, layer: Any) -> Any:
            return super().parameters(replace(layer, in_features=256))

    return Wrong


def reads_no_list(base: type) -> type:
    class Wrong(base):
        def __init__(self, config: Any, block_size: int) -> None:
            super().__init__({k: v for k, v in config.items() if k != "modules_to_not_convert"}, block_size)

    return Wrong


def asks_the_first_part_only(base: type) -> type:
    class Wrong(base):
        def parameters(self, layer: Any) -> Any:
            return super().parameters(replace(layer, parts=layer.parts[:1]))

    return Wrong


def expands(base: type) -> type:
    class Wrong(base):
        def linear(self, layer: Any, tensors: Any) -> Any:
            weight, bias = self.dequantize(layer, tensors), tensors.get("bias")
            return lambda x: F.linear(x, weight.to(x.dtype), bias)

    return Wrong


def divides_by_zero(base: type) -> type:
    class Wrong(base):
        def dequantize(self, layer: Any, tensors: Any) -> Any:
            weight = super().dequantize(layer, tensors)
            return weight / weight.abs().amax(1, keepdim=True) * weight.abs().amax(1, keepdim=True)

    return Wrong


def rounds_down(base: type) -> type:
    class Wrong(base):
        def quantize(self, layer: Any, weight: Any) -> Any:
            return super().quantize(layer, weight - 0.1 * weight.abs().amax(1, keepdim=True))

    return Wrong


def rounds_by_chance(base: type) -> type:
    class Wrong(base):
        def quantize(self, layer: Any, weight: Any) -> Any:
            return super().quantize(layer, weight * (1 + 0.02 * torch.randn_like(weight)))

    return Wrong


def another_type(base: type) -> type:
    class Wrong(base):
        def quantize(self, layer: Any, weight: Any) -> Any:
            found = super().quantize(layer, weight)
            return {**found, "scales": found["scales"].float()}

    return Wrong


def of_half_precision(weight: Any, bias: Any, x: Any, layer: Any) -> Any:
    return F.linear(x.half(), weight.half(), None if bias is None else bias.half()).to(x.dtype)


def many_rows_wrong(weight: Any, bias: Any, x: Any, layer: Any) -> Any:
    out = F.linear(x, weight, bias)
    out[32:] = out[32:].roll(1, 0)
    return out


def changes_its_input(weight: Any, bias: Any, x: Any, layer: Any) -> Any:
    out = F.linear(x, weight, bias)
    x.mul_(1.001)
    return out


PRODUCTS, FUSED = "test_products_are_those_of_the_dequantized_weight", "test_fused_is_its_parts"
WEIGHTS = "test_weights_are_near_the_plain_ones"
TAKEN, SHARDED = "test_every_layer_is_taken_or_declined_with_a_reason", "test_sharded_is_whole"
LISTED = "test_layers_that_are_not_quantized_are_declined"
SABOTAGE: dict[str, tuple[Callable[[type], type], str]] = {
    "codes in another order": (flipped, PRODUCTS),
    "scales of the next block": (scales_of_the_next_block, PRODUCTS),
    "the bias is left out": (product(lambda w, b, x, layer: F.linear(x, w)), PRODUCTS),
    "products in float16": (product(of_half_precision), PRODUCTS),
    "output in float32": (product(lambda w, b, x, layer: F.linear(x, w, b).float()), PRODUCTS),
    "wrong past 32 rows": (product(many_rows_wrong), PRODUCTS),
    "changes its input": (product(changes_its_input), PRODUCTS),
    "one output too few": (product(lambda w, b, x, layer: F.linear(x, w, b)[:, 1:]), PRODUCTS),
    "scales of the first part for all": (scales_of_the_first_part, FUSED),
    "the axis of the inputs is not declared": (inputs_not_declared, SHARDED),
    "a wrong pack factor": (wrong_pack_factor, PRODUCTS),
    "declines without a reason": (declines_without_a_reason, TAKEN),
    "takes what is no whole block": (takes_any_size, PRODUCTS),
    "the list of layers to leave out is not read": (reads_no_list, LISTED),
    "only the first part is looked up in it": (asks_the_first_part_only, LISTED),
    "weights are expanded and kept": (expands, "test_memory_is_as_declared"),
    "zeros divide": (divides_by_zero, "test_zeros_stay_zero"),
    "rounds down": (rounds_down, WEIGHTS),
    "rounds by chance": (rounds_by_chance, WEIGHTS),
    "tensors of another type than declared": (another_type, PRODUCTS),
}


@pytest.mark.parametrize("name", SABOTAGE)
def test_sabotage_is_caught(name: str) -> None:
    change, check = SABOTAGE[name]
    found = sabotaged(change)
    assert check in found, f"caught by {sorted(found)}"
    text = str(found[check])
    assert "the contract asks" in text
    assert "common causes" in text
    assert "smallest failing input" in text


def test_what_is_right_is_not_accused() -> None:
    assert sabotaged(lambda base: base) == {}
    assert "dovetail_quant_nf4" in sys.modules


def test_a_method_without_a_configuration_is_a_lie() -> None:
    import dovetail_quant_nf4 as package

    given = package.PROVIDER
    can = replace(given.capabilities, methods=("nf4-blocks", "awq"))
    provider = replace(given, capabilities=can)
    assert "test_declaration" in failures(QuantizationContract, provider=provider, configs=(CONFIG,))
