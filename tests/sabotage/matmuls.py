"""Mistakes that products by quantized weights make, over the worker's reference in torch."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F

from dovetail.interfaces.matmul import dequantized
from dovetail.plugin.discovery import load_registry
from dovetail_worker_torch.matmul import TorchMatmul, round_inputs
from sabotage import Sabotages

PROVIDER = next(
    o.provider
    for o in load_registry().of("matmul")
    if o.qualified_name == "dovetail-worker-torch:torch"
)
SABOTAGES = Sabotages("matmul", PROVIDER)
PRODUCTS, ROUNDED, ZEROS, NANS, MEMORY, DECLARED = (
    "test_products_are_those_of_the_dequantized_weight",
    "test_rounded_inputs",
    "test_zeros_are_zeros",
    "test_what_is_no_number_stays_none",
    "test_memory_is_as_declared",
    "test_declaration",
)
sabotage = SABOTAGES.of_class(lambda cls, c, o: cls())


class Product(TorchMatmul):
    """Computes `product(x, weight, bias)` in float32, from what `weight` and `inputs` give."""

    def weight(self, format, layer, tensors):
        return dequantized(format, layer.in_features, tensors)

    def inputs(self, x, format, tensors):
        return (
            x
            if format.inputs is None
            else round_inputs(x, format.inputs, tensors.get("input_scale"))
        )

    def product(self, x, weight, bias):
        return F.linear(x, weight, bias)

    def linear(self, format, layer, tensors):
        kept = dict(tensors)

        def multiply(x):
            bias = kept["bias"].float() if layer.bias else None
            return self.product(
                self.inputs(x.float(), format, kept), self.weight(format, layer, kept), bias
            ).to(x.dtype)

        return multiply


@sabotage(PRODUCTS)
class HalvesSwapped(Product):
    """The second of two 4-bit codes is in the low half of a byte."""

    def weight(self, format, layer, tensors):
        if format.codes == "uint4":
            tensors = {**tensors, "codes": tensors["codes"] << 4 | tensors["codes"] >> 4}
        return super().weight(format, layer, tensors)


@sabotage(PRODUCTS)
class ZerosLeftOut(Product):
    """Zero points are not subtracted."""

    def weight(self, format, layer, tensors):
        return super().weight(replace(format, zeros=False), layer, tensors)


@sabotage(PRODUCTS)
class SignedNibbles(Product):
    """4-bit codes of 8 and more are negative."""

    def weight(self, format, layer, tensors):
        if format.codes == "uint4":
            tensors = {**tensors, "codes": tensors["codes"] ^ 0x88}
        return super().weight(format, layer, tensors)


@sabotage(PRODUCTS)
class ScalesOfTheNextGroup(Product):
    """A group is scaled by the scale of the next one."""

    def weight(self, format, layer, tensors):
        return super().weight(format, layer, {**tensors, "scales": tensors["scales"].roll(1, 1)})


@sabotage(PRODUCTS)
class LastGroupLeftOut(Product):
    """A last group that is smaller than the others is taken for zeros."""

    def weight(self, format, layer, tensors):
        weight, size = (
            super().weight(format, layer, tensors),
            format.group_size or layer.in_features,
        )
        order = tensors["order"] if format.order else torch.arange(layer.in_features)
        weight[:, order[layer.in_features // size * size :]] = 0
        return weight


@sabotage(PRODUCTS)
class OrderTheWrongWayRound(Product):
    """The inputs' order is applied instead of undone."""

    def weight(self, format, layer, tensors):
        if format.order:
            tensors = {**tensors, "order": tensors["order"].argsort()}
        return super().weight(format, layer, tensors)


@sabotage(PRODUCTS)
class BiasLeftOut(Product):
    """The bias is left out."""

    def product(self, x, weight, bias):
        return F.linear(x, weight)


@sabotage(PRODUCTS)
class RowsAreTogether(TorchMatmul):
    """Rows of x are taken to follow each other in memory."""

    def linear(self, format, layer, tensors):
        multiply = super().linear(format, layer, tensors)
        return lambda x: multiply(x.as_strided(x.shape, (x.shape[1], 1)))


@sabotage(PRODUCTS)
class ManyRowsWrong(Product):
    """Rows past the 32nd are another row's."""

    def product(self, x, weight, bias):
        out = F.linear(x, weight, bias)
        out[32:] = out[32:].roll(1, 0)
        return out


@sabotage(PRODUCTS)
class WeightsInBfloat16(Product):
    """Weights are rounded to bfloat16, whatever the type of x."""

    def weight(self, format, layer, tensors):
        return super().weight(format, layer, tensors).bfloat16().float()


@sabotage(PRODUCTS)
class ChangesItsInput(TorchMatmul):
    """The input is written to."""

    def linear(self, format, layer, tensors):
        multiply = super().linear(format, layer, tensors)

        def changing(x):
            out = multiply(x)
            x.mul_(1.001)
            return out

        return changing


@sabotage(ROUNDED)
class OneScaleForAllRows(Product):
    """Inputs are rounded by one scale for all rows."""

    def inputs(self, x, format, tensors):
        if format.inputs is None or format.input_scale:
            return super().inputs(x, format, tensors)
        return round_inputs(x.reshape(1, -1), format.inputs).reshape(x.shape)


@sabotage(ROUNDED)
class NotRounded(Product):
    """Inputs are not rounded."""

    def inputs(self, x, format, tensors):
        return x


@sabotage(ROUNDED)
class RoundedTowardsZero(Product):
    """Inputs are cut off, not rounded to the nearest."""

    def inputs(self, x, format, tensors):
        if format.inputs != "int8":
            return super().inputs(x, format, tensors)
        scale = (
            tensors["input_scale"] if format.input_scale else x.abs().amax(1, keepdim=True) / 127
        )
        return (x / scale.clamp_min(1e-30)).clamp(-127, 127).trunc() * scale


@sabotage(ROUNDED)
class InputScaleLeftOut(Product):
    """The scale of the format is not looked at: each row has its own."""

    def inputs(self, x, format, tensors):
        return super().inputs(x, format, {k: v for k, v in tensors.items() if k != "input_scale"})


@sabotage(ROUNDED)
class WrapsAround(Product):
    """What is too large for a static scale wraps around."""

    def inputs(self, x, format, tensors):
        if format.inputs != "int8" or not format.input_scale:
            return super().inputs(x, format, tensors)
        return (x / tensors["input_scale"]).round().to(torch.int32).to(
            torch.int8
        ).float() * tensors["input_scale"]


@sabotage(ZEROS)
class DividesByZero(Product):
    """A row of zeros is divided by its largest."""

    def inputs(self, x, format, tensors):
        return x / x.abs().amax(1, keepdim=True) * x.abs().amax(1, keepdim=True)


@sabotage(NANS)
class NanBecomesZero(Product):
    """What is not a number is taken for 0."""

    def inputs(self, x, format, tensors):
        return super().inputs(x.nan_to_num(), format, tensors)


@sabotage(NANS)
class NanInAllRows(Product):
    """What is not a number in one row makes all rows so."""

    def product(self, x, weight, bias):
        return F.linear(x, weight, bias) + 0 * x.sum()


@sabotage(MEMORY)
class Expands(Product):
    """Weights are expanded once, and kept so."""

    def linear(self, format, layer, tensors):
        weight, kept = self.weight(format, layer, tensors), dict(tensors)
        bias = kept["bias"].float() if layer.bias else None
        return lambda x: F.linear(self.inputs(x.float(), format, kept), weight, bias).to(x.dtype)


@sabotage(DECLARED, capabilities=replace(PROVIDER.capabilities, codes=()))
class DeclaresNoCodes(TorchMatmul):
    """No codes are declared."""
