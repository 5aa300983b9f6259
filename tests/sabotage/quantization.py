"""Mistakes that quantization schemes make, over the NF4 of the examples."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dovetail.interfaces.quantization import OUT, Axis, Declined, Parameter
from dovetail_quant_nf4 import CAPABILITIES, PROVIDER
from dovetail_quant_nf4.scheme import NF4
from sabotage import Sabotages

SABOTAGES = Sabotages(
    "quantization", PROVIDER, declined=("model.layers.3.mlp.kit_proj",), weight_error=0.12
)
PRODUCTS, FUSED, SHARDED, TAKEN, LISTED, WEIGHTS = (
    "test_products_are_those_of_the_dequantized_weight",
    "test_fused_is_its_parts",
    "test_sharded_is_whole",
    "test_every_layer_is_taken_or_declined_with_a_reason",
    "test_layers_that_are_not_quantized_are_declined",
    "test_weights_are_near_the_plain_ones",
)
sabotage = SABOTAGES.of_class(
    lambda cls, c, o: cls(c.model.quantization_config or {}, o.block_size)
)


class Product(NF4):
    """Computes `product(weight, bias, x)`."""

    def linear(self, layer, tensors):
        kept = dict(tensors)
        return lambda x: self.product(self.dequantize(layer, kept).to(x.dtype), kept.get("bias"), x)


@sabotage(PRODUCTS)
class CodesSwapped(NF4):
    """The two codes of a byte are in another order."""

    def linear(self, layer, tensors):
        return super().linear(
            layer, {**tensors, "codes": tensors["codes"] << 4 | tensors["codes"] >> 4}
        )


@sabotage(PRODUCTS)
class ScalesOfTheNextBlock(NF4):
    """A block is scaled by the scale of the next one."""

    def linear(self, layer, tensors):
        return super().linear(layer, {**tensors, "scales": tensors["scales"].roll(1, 1)})


@sabotage(PRODUCTS)
class BiasLeftOut(Product):
    """The bias is left out."""

    def product(self, weight, bias, x):
        return F.linear(x, weight)


@sabotage(PRODUCTS)
class HalfPrecision(Product):
    """Products are computed in float16, whatever the type of the input."""

    def product(self, weight, bias, x):
        return F.linear(x.half(), weight.half(), None if bias is None else bias.half()).to(x.dtype)


@sabotage(PRODUCTS)
class AnotherTypeOut(Product):
    """The output is in float32, whatever the type of the input."""

    def product(self, weight, bias, x):
        return F.linear(x, weight, bias).float()


@sabotage(PRODUCTS)
class ManyRowsWrong(Product):
    """Rows past the 32nd are another row's."""

    def product(self, weight, bias, x):
        out = F.linear(x, weight, bias)
        out[32:] = out[32:].roll(1, 0)
        return out


@sabotage(PRODUCTS)
class ChangesItsInput(Product):
    """The input is written to."""

    def product(self, weight, bias, x):
        out = F.linear(x, weight, bias)
        x.mul_(1.001)
        return out


@sabotage(PRODUCTS)
class OneOutputTooFew(Product):
    """The first output is missing."""

    def product(self, weight, bias, x):
        return F.linear(x, weight, bias)[:, 1:]


@sabotage(FUSED)
class ScalesOfTheFirstPart(NF4):
    """All parts of a fused layer have the first one's scale."""

    def linear(self, layer, tensors):
        first, scales = layer.parts[0].out_features, tensors["scales"].clone()
        scales[first:] = scales[:1]
        return super().linear(layer, {**tensors, "scales": scales})


@sabotage(SHARDED)
class InputsNotDeclared(NF4):
    """That an axis of the scales is the inputs' is not declared."""

    def parameters(self, layer):
        found = super().parameters(layer)
        if isinstance(found, Declined):
            return found
        return {
            **found,
            "scales": Parameter((OUT, layer.in_features // self._block_size), "float16"),
        }


@sabotage(PRODUCTS)
class WrongPackFactor(NF4):
    """Four inputs a byte are declared, and there are two."""

    def parameters(self, layer):
        found = super().parameters(layer)
        return (
            found
            if isinstance(found, Declined)
            else {**found, "codes": Parameter((OUT, Axis("in", 4)), "uint8")}
        )


@sabotage(TAKEN)
class DeclinesWithoutAReason(NF4):
    """A layer is declined, and not said why."""

    def parameters(self, layer):
        return Declined("") if layer.in_features % self._block_size else super().parameters(layer)


@sabotage(PRODUCTS)
class TakesAnySize(NF4):
    """Layers are taken whose inputs are not whole blocks."""

    def parameters(self, layer):
        return super().parameters(replace(layer, in_features=256))


@sabotage(LISTED)
class ListNotRead(NF4):
    """The checkpoint's list of layers to leave out is not read."""

    def __init__(self, config, block_size):
        super().__init__(
            {k: v for k, v in config.items() if k != "modules_to_not_convert"}, block_size
        )


@sabotage(LISTED)
class OnlyTheFirstPartLookedUp(NF4):
    """Of a fused layer only the first part is looked up in the list of layers to leave out."""

    def parameters(self, layer):
        return super().parameters(replace(layer, parts=layer.parts[:1]))


@sabotage("test_memory_is_as_declared")
class Expands(NF4):
    """Weights are expanded once, and kept so."""

    def linear(self, layer, tensors):
        weight, bias = self.dequantize(layer, tensors), tensors.get("bias")
        return lambda x: F.linear(x, weight.to(x.dtype), bias)


@sabotage("test_zeros_stay_zero")
class DividesByZero(NF4):
    """A row of zeros is divided by its largest."""

    def dequantize(self, layer, tensors):
        weight = super().dequantize(layer, tensors)
        return weight / weight.abs().amax(1, keepdim=True) * weight.abs().amax(1, keepdim=True)


@sabotage("test_damaged_scales_are_refused")
class ScaleNotDeclared(NF4):
    """That the scales are scales is not declared, so nobody looks at what they hold."""

    def parameters(self, layer):
        found = super().parameters(layer)
        return (
            found
            if isinstance(found, Declined)
            else {**found, "scales": replace(found["scales"], scale=None)}
        )


@sabotage("test_zeros_stay_zero")
class ScaleNeverZero(NF4):
    """Scales are declared as positive, and rows of zeros have the scale 0."""

    def parameters(self, layer):
        found = super().parameters(layer)
        return (
            found
            if isinstance(found, Declined)
            else {**found, "scales": replace(found["scales"], scale="positive")}
        )


@sabotage(WEIGHTS)
class RoundsDown(NF4):
    """Weights are rounded towards one side."""

    def quantize(self, layer, weight):
        return super().quantize(layer, weight - 0.1 * weight.abs().amax(1, keepdim=True))


@sabotage(WEIGHTS)
class RoundsByChance(NF4):
    """The same weights are quantized in another way each time."""

    def quantize(self, layer, weight):
        return super().quantize(layer, weight * (1 + 0.02 * torch.randn_like(weight)))


@sabotage(PRODUCTS)
class TensorsOfAnotherType(NF4):
    """Scales are float32, and declared as float16."""

    def quantize(self, layer, weight):
        found = super().quantize(layer, weight)
        return {**found, "scales": found["scales"].float()}


@sabotage(
    "test_declaration", capabilities=replace(CAPABILITIES, methods=(*CAPABILITIES.methods, "awq"))
)
class MethodThatLies(NF4):
    """A method is declared, and no configuration of it given."""
